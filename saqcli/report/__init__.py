"""Pictures, report pages, comparison of runs."""
