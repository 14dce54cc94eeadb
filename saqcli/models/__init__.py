"""The outside world: networks and their weights, data, run directories, signals."""
