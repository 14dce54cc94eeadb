"""Plots, report pages, and the comparison of runs."""
