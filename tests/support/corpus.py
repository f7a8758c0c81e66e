"""English paragraphs from Python's manual."""

import pydoc_data.topics

PARAGRAPHS = [
    " ".join(block.split())
    for topic in sorted(pydoc_data.topics.topics)
    for block in pydoc_data.topics.topics[topic].split("\n\n")
    if len(block) >= 40
]
