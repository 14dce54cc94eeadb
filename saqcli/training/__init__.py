"""Training: objective, minimizers, the step with its recovery, the loops over batches, and the trainer."""
