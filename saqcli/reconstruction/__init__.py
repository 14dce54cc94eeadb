"""Post-training reconstruction: a quantized network is fitted to its float network on unlabelled images."""
