"""Searches that need no images: solved again from the scores of a run."""
