"""The page of a run: one HTML file, made from the files of its directory."""
