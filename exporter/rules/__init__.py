"""What each TensorRT release takes of ONNX, and whether a graph keeps to it."""
