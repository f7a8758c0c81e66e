"""Index the lines of a file with a late-interaction model, and print the best three for a question.

python examples/late_interaction.py colbert-ir/colbertv2.0 notes.txt "How do I resume a job?"
"""

import sys
from pathlib import Path

import unpadded

model, file, question = sys.argv[1:]
lines = [line for line in Path(file).read_text().splitlines() if line.strip()]

engine = unpadded.load(model)
documents = engine.encode_tokens(lines, pool_factor=2)  # half of the vectors
print(f"{len(lines)} lines have {len(documents.vectors)} vectors")

(query,) = engine.encode_tokens(question, kind="query")
scores = unpadded.maxsim(query, documents)
for row in scores.argsort()[::-1][:3]:
    print(f"{scores[row]:.3f}  {lines[row]}")
