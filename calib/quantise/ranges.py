"""How large the activations of a graph are: histograms of magnitudes, pooled over pictures, one picture in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from svdprune.calib.quantise.scheme import Scheme
from svdprune.runtime.errors import NumericalError
from svdprune.runtime.ort import open_session
from svdprune.runtime.tiling.feed import Prepared

# A bin is the sign-less float32 number without its last bits: 64 bins an octave, over all octaves there are.
_SHIFT = 17
_BINS = 1 << (31 - _SHIFT)
_INFINITE = 0x7F800000 >> _SHIFT  # from this bin on: infinity and NaN
_BITS = (np.arange(_INFINITE, dtype=np.uint32) << _SHIFT) + (1 << (_SHIFT - 1))
_CENTRES = _BITS.view(np.float32).astype(np.float64)
_CLIPS = 0.5 ** (np.arange(0, 193) / 32)  # shares of the largest magnitude tried as a range: six octaves

_CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
FLOAT8_SPREAD = float(np.std(_CODES[np.isfinite(_CODES)]))
"""The spread of all finite 8-bit floats: ONNX Runtime's rule scales a normal distribution to it."""


class Magnitudes:
    """What was seen of one tensor: a histogram of |x| whose bins are 1.6 % wide or less, the largest, the spread."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.largest = 0.0
        self._squares = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count the values of a float array.

        Raises:
            NumericalError: NaN or infinity among them.
        """
        flat = np.ascontiguousarray(values, np.float32).ravel()
        self.counts += np.bincount((flat.view(np.uint32) & 0x7FFFFFFF) >> _SHIFT, minlength=_BINS)
        if self.counts[_INFINITE:].any():
            raise NumericalError(
                "the vision encoder gave NaN or infinity on a calibration picture: no scales can be set; check the "
                "checkpoint's weights, or export with --precision fp32"
            )
        self.largest = max(self.largest, float(np.abs(flat).max(initial=0.0)))
        self._squares += float(np.dot(flat.astype(np.float64), flat))

    @property
    def spread(self) -> float:
        """Root of the mean square."""
        return float((self._squares / max(1, self.counts.sum())) ** 0.5)

    def range(self, rule: str, largest_code: float) -> float:
        """The magnitude that the largest code shall stand for; larger ones are clipped.

        Args:
            rule: ``max``, the largest magnitude seen; ``mse``, the one whose rounding and clipping errors of evenly
                spaced codes have the least sum of squares; ``distribution``, ONNX Runtime's rule for 8-bit floats,
                which fits the spread of the codes to that of the values.
            largest_code: of the scheme.
        """
        if rule == "max" or self.largest == 0.0:
            return self.largest
        if rule == "distribution":
            return self.spread / FLOAT8_SPREAD * largest_code
        seen = np.flatnonzero(self.counts)
        sizes, counts = np.minimum(_CENTRES[seen], self.largest), self.counts[seen]
        return float(min(self.largest * _CLIPS, key=lambda clip: _error(sizes, counts, clip, largest_code)))


def _error(sizes: np.ndarray, counts: np.ndarray, clip: float, largest_code: float) -> float:
    """Sum of the expected squared errors of `counts` values of `sizes`, rounded to multiples of clip / largest_code."""
    rounding = np.minimum(sizes**2, (clip / largest_code) ** 2 / 12)  # what is below half a step becomes 0
    return float(counts @ np.where(sizes > clip, (sizes - clip) ** 2, rounding))


def collect_ranges(
    graph: Path,
    tensors: Sequence[str],
    pictures: Sequence[Prepared],
    threads: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Magnitudes]:
    """Run the pictures through a vision graph and look at some of its tensors.

    Args:
        graph: the float graph; a small file is written beside it for a moment.
        tensors: names of values in it.
        pictures: the graph's inputs for each. One is run at a time.
        threads: of ONNX Runtime; None for all.
        report: called with the count of pictures done.

    Raises:
        NumericalError: NaN or infinity in a tensor.
    """
    model = onnx.load(str(graph), load_external_data=False)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    place = graph.with_name(f"{graph.stem}-ranges.onnx")
    place.write_bytes(model.SerializeToString())
    try:
        session = open_session(place, threads)
        found = {name: Magnitudes() for name in tensors}
        for done, picture in enumerate(pictures, 1):
            for name, values in zip(tensors, session.run(list(tensors), picture.inputs), strict=True):
                found[name].add(values)
            report(done)
    finally:
        place.unlink()
    return found


def scale_of(magnitudes: Magnitudes, rule: str, scheme: Scheme) -> float:
    """The step between codes for a tensor, 1 for one that is 0 everywhere."""
    return magnitudes.range(rule, scheme.largest) / scheme.largest or 1.0
