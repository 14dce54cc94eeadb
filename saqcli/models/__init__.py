"""Networks by name: libraries, weights, preprocessing."""
