"""Pipelines: the steps of each command from top to bottom, one file per command.

Pipelines print nothing: they read and write files, report to a ``Progress``, and return a result.
"""
