"""Steps of few significant bits, norms folded into weights, and biases on the grid of sums: sums that are exact."""
