"""Serve bundles over HTTP. Never imports torch, onnx, export or the training code."""
