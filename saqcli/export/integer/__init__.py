"""Integers from input to logits: the graph arranged for integer kernels, and biases in units of the accumulator."""
