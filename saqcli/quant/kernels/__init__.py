"""Quantizers in one pass over memory, forward and backward; which kernel a model uses."""
