"""The vocabulary of quantization: bits, grids, quantizers, layers, costs.

Knows tensors and modules; knows no file, no flag and no loop over a data set. Imports nothing above it.
"""
