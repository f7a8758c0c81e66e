"""Embed a corpus with Ray Data: Parquet to Parquet, one engine per actor.

pip install '.[ray]'
python examples/ray_corpus.py corpus/ vectors/
"""

import sys

import ray

from unpadded.integrations.ray import embed

source, target = sys.argv[1:]
corpus = ray.data.read_parquet(source)
vectors = embed(
    corpus,
    "sentence-transformers/all-MiniLM-L6-v2",
    actors=(1, 8),  # the minimum and the maximum
    num_cpus=1,  # per actor; num_gpus=1 on a cluster with GPUs
    column="text",
    precision="float16",
)
vectors.write_parquet(target)
