"""A checkpoint as tensors: weights, packed batches, attention and the encoder."""
