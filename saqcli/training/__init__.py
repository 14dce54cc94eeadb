"""The science: minimizers, searchers, exporters and the only loops over batches.

Knows tensors, modules and data loaders; knows no flag and no run directory.
"""
