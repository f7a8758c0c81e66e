"""From a checkpoint to hidden states: weights, layers, packed batches, attention and the encoder."""
