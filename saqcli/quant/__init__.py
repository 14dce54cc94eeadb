"""Quantization: bits, grids, quantizers, layers, costs.

Knows tensors and modules, but no files, flags or data sets.
"""
