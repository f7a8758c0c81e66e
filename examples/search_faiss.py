"""Search the paragraphs of a folder's Markdown files with FAISS.

pip install faiss-cpu
python examples/search_faiss.py docs "How do I resume a job?"
"""

import sys
from pathlib import Path

import faiss

import unpadded

folder, question = sys.argv[1:]
found = [
    (path.name, " ".join(paragraph.split()))
    for path in sorted(Path(folder).rglob("*.md"))
    for paragraph in path.read_text().split("\n\n")
    if len(paragraph) > 40
]

engine = unpadded.load("sentence-transformers/all-MiniLM-L6-v2")
index = faiss.IndexFlatIP(engine.dimensions)  # inner product: the vectors have length 1
index.add(engine.encode([text for _, text in found]))

scores, rows = index.search(engine.encode([question]), 3)
for score, row in zip(scores[0], rows[0], strict=True):
    name, text = found[row]
    print(f"{score:.3f}  {name}: {text[:100]}")
