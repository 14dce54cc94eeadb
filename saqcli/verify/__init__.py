"""Between a quantized model and an ONNX graph: what the styles are made of, and the proof that they hold."""
