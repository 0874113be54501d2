"""The two 8-bit schemes, in the form that TensorRT's parsers accept: symmetric, zero points of 0."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How values become 8 bits.

    Attributes:
        name: as ``--precision`` takes it.
        largest: the largest code; a scale is a range over it.
        per_channel: whether each output channel of a weight has a scale of its own.
        rules: how a range may be set from what was seen, each tried (see ``ranges.Magnitudes.range``).
        convolutions: whether convolutions are quantised. TensorRT has 8-bit float convolutions for 16 channels and more
            only, and a picture has three.
    """

    name: str
    largest: float
    per_channel: bool
    rules: tuple[str, ...]
    convolutions: bool

    def opset(self, half: bool) -> int:
        """The lowest opset whose QuantizeLinear takes this type (and float16, where the graph is `half`)."""
        return 19 if half or self.name == "fp8" else 13


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 127.0, True, ("mse", "max"), True),
        Scheme("fp8", 448.0, False, ("max", "distribution"), False),
    )
}
