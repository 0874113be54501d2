"""8-bit weights and activations in a vision graph: where, with which scales, and what it costs.

    sites       which nodes are quantised, by block
    ranges      how large the activations are, from calibration pictures
    insert      Q/DQ pairs around all of them, by ONNX Runtime's static quantiser
    restore     the same graph with some blocks left in float
    judge       how far such a graph is from the float one, on pictures that set no scale
    sweep       which blocks to leave in float

Nothing here knows a model family: a graph has the input `pixels`, the outputs of a vision graph, and names its nodes
`module.path/leaf`.
"""

from __future__ import annotations

from svdprune.calib.quantise.insert import quantise_all
from svdprune.calib.quantise.judge import Change, Judge, Seen
from svdprune.calib.quantise.ranges import Magnitudes, collect_ranges
from svdprune.calib.quantise.restore import restore_float
from svdprune.calib.quantise.scheme import SCHEMES, Scheme
from svdprune.calib.quantise.sites import Site, find_sites
from svdprune.calib.quantise.sweep import BlockChange, Choice, choose, sweep

__all__ = [
    "SCHEMES",
    "BlockChange",
    "Change",
    "Choice",
    "Judge",
    "Magnitudes",
    "Scheme",
    "Seen",
    "Site",
    "choose",
    "collect_ranges",
    "find_sites",
    "quantise_all",
    "restore_float",
    "sweep",
]
