"""Run directories: manifest, checkpoints, locks, and the signals that interrupt a run."""
