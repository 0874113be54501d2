"""Options that several commands share. Backends are chosen by name and never replaced by another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def backend_options(function: Function) -> Function:
    """``--vision-backend``, ``--decoder-backend``, ``--checkpoint`` and ``--threads``."""
    for option in reversed(
        (
            click.option(
                "--vision-backend",
                default="onnxruntime",
                show_default=True,
                metavar="NAME",
                help="onnxruntime, onnxruntime-cuda, or the engine that `svdprune build` made: tensorrt, tensorrt_rtx.",
            ),
            click.option(
                "--decoder-backend",
                default="onnxruntime",
                show_default=True,
                metavar="NAME",
                help="onnxruntime, the engine that `svdprune build` made (tensorrt, tensorrt_rtx), or transformers.",
            ),
            click.option("--checkpoint", metavar="PATH", help="Original weights, for --decoder-backend transformers."),
            click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]"),
        )
    ):
        function = option(function)
    return function
