"""Reconstruction: a quantized network is fitted to the float network block by block, on unlabelled images.

Knows tensors, modules and calls, but no files, data sets or flags.
"""
