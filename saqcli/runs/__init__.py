"""Run directories: manifest, checkpoints, locks, and signal handling."""
