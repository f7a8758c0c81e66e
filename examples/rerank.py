"""Find lines of a file with an embedder, then sort the best 50 with a reranker, which reads question and line together.

python examples/rerank.py cross-encoder/ms-marco-MiniLM-L6-v2 notes.txt "How do I resume a job?"
"""

import sys
from pathlib import Path

import unpadded

reranker_name, file, question = sys.argv[1:]
lines = [line for line in Path(file).read_text().splitlines() if line.strip()]

embedder = unpadded.load("sentence-transformers/all-MiniLM-L6-v2")
scores = embedder.encode(lines) @ embedder.encode(question)
candidates = [lines[row] for row in scores.argsort()[::-1][:50]]

reranker = unpadded.load(reranker_name)
for found in reranker.rank(question, candidates, top_k=3):
    print(f"{found.score:.3f}  {candidates[found.index]}")
