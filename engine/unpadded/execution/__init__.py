"""Batches of token ids on devices: scheduling, batching, CUDA graphs and worker processes."""
