"""Find passages of long documents. The vector of a passage is computed in the context of its document (late chunking).

python examples/late_chunking.py docs "How do I resume a job?"
"""

import sys
from pathlib import Path

import unpadded

folder, question = sys.argv[1:]
paths = sorted(Path(folder).rglob("*.md"))
documents = [path.read_text() for path in paths]

engine = unpadded.load("nomic-ai/nomic-embed-text-v1.5")
spans = engine.encode_spans(documents, span_tokens=128, task="search_document", normalize=True)
scores = spans.vectors @ engine.encode(question, task="search_query", normalize=True)

for row in scores.argsort()[::-1][:3]:
    document, (start, end) = spans.text_index[row], spans.bounds[row]
    passage = " ".join(documents[document][start:end].split())
    print(f"{scores[row]:.3f}  {paths[document].name}, from character {start}: {passage[:100]}")
