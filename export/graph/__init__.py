"""Build, rewrite and convert ONNX graphs. Imports quantization, of export."""
