"""Find lines of a file by the terms that a SPLADE model weighs, and show which of them a line shares with the question.

python examples/sparse.py naver/splade-v3 notes.txt "How do I resume a job?"
"""

import sys
from pathlib import Path

import unpadded

model, file, question = sys.argv[1:]
lines = [line for line in Path(file).read_text().splitlines() if line.strip()]

engine = unpadded.load(model)
documents, query = engine.encode_sparse(lines), engine.encode_sparse(question)
scores = (documents.to_scipy() @ query.to_scipy().T).toarray()[:, 0]

asked = dict(query.tokens(0))
for row in scores.argsort()[::-1][:3].tolist():
    shared = {token: weight * asked[token] for token, weight in documents.tokens(row) if token in asked}
    terms = ", ".join(sorted(shared, key=lambda token: -shared[token])[:3]) or "no term"
    print(f"{scores[row]:.3f}  {lines[row]}  ({terms})")
