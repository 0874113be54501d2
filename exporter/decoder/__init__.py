"""The language model as an ONNX graph with position ids and a key-value cache, authored from the safetensors.

Why our own graph and not a model builder: see `docs/parity.md`, "How the decoder graph is made".
"""

from svdprune.exporter.decoder.config import SUPPORTED
from svdprune.exporter.decoder.export import export_decoder
from svdprune.exporter.decoder.operators import PRECISIONS
from svdprune.runtime.manifest import DecoderInfo

__all__ = ["PRECISIONS", "SUPPORTED", "DecoderInfo", "export_decoder"]
