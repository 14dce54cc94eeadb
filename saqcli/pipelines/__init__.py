"""One file per command, each the story of that command from top to bottom.

Pipelines print nothing: they read and write files, report to a ``Progress``, and return a result.
"""
