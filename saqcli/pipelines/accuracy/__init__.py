"""Budgets of accuracy: configurations measured by the method of the run, on held-out images."""
