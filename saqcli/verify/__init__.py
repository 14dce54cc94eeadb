"""Verification that an exported file computes the same as the model."""
