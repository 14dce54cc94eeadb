"""The proof that an exported file computes what the model computes."""
