"""Runs on disk: their directory, manifest, checkpoints, locks, and signals that interrupt them."""
