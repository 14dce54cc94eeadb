"""From names to networks: libraries, published and local weights, preprocessing."""
