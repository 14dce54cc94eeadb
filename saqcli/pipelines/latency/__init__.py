"""Latency of the layers of a network on this machine, as a table of costs."""
