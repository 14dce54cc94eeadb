"""Fine-tuning: objectives, perturbations, minimizers, and the only loops over batches.

Knows tensors, modules and data loaders, but no flags.
"""
