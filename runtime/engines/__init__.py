"""TensorRT and TensorRT-RTX engines: built on the device from a bundle, kept beside it, and run."""
