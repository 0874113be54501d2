"""What TensorRT tells while it works: its log, and how far a build has come.

Both are filled from inside TensorRT's own calls, where nothing may raise; whoever waits for the build looks at them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from svdprune.runtime.engines.faults import explain
from svdprune.runtime.errors import UserError

_LAYER = re.compile(r"^Name: .*LayerType:", re.MULTILINE)  # how the builder lists the layers of a finished engine
_NO_DRIVER = re.compile(r"cudaError 35\b")
_BYTES = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")


@dataclass
class BuildLog:
    """A sink for ``TensorRt.logger`` that keeps the little that is asked for later.

    Attributes:
        errors, warnings: messages, in order, each once.
        layers: how many layers of the finished engine were listed.
        sizes: "Activation" and "Weights" in bytes, where told.
        lines: every message, with ``keep``; they are many.
    """

    keep: bool = False
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __call__(self, severity: str, message: str) -> None:
        """Take one message."""
        if self.keep:
            self.lines.append(f"[{severity}] {message}")
        kept = {"INTERNAL_ERROR": self.errors, "ERROR": self.errors, "WARNING": self.warnings}.get(severity)
        if kept is not None:
            if message not in kept:
                kept.append(message)
        elif _LAYER.search(message):  # all of an engine's come in one message
            self.layers = len(_LAYER.findall(message))
        elif size := _BYTES.match(message):
            self.sizes[size[1]] = int(size[2])

    def fault(self, doing: str) -> str:
        """A sentence on why ``doing`` ("building the vision engine") failed."""
        errors = causes(self.errors)
        known = explain("\n".join([*errors, *self.warnings]))
        if known:
            return f"{doing} failed: {known}"
        said = first_line(errors[0]) if errors else "TensorRT gave no reason"
        return f"{doing} failed ({said}): `svdprune build --log FILE` keeps all that TensorRT says"


class Progress:
    """How far a build has come, from its nested phases.

    Attributes:
        cancelled: set it to ask the build to stop at its next step.
        phase: the innermost phase under way, "" before the first.
        share: the share of the whole that is done, 0 to 1.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.phase = ""
        self.share = 0.0
        self._phases: list[tuple[str, int]] = []  # name and count of steps, outermost first
        self._done: dict[str, int] = {}

    def start(self, name: str, steps: int) -> None:
        """A phase of ``steps`` steps begins inside those under way."""
        self._phases.append((name, max(1, steps)))
        self._done[name] = 0
        self.phase = name
        self._measure()

    def step(self, name: str, step: int) -> None:
        """The step number ``step``, from 0, of a phase is done."""
        self._done[name] = step + 1
        self._measure()

    def finish(self, name: str) -> None:
        """A phase is over; phases inside it are, too."""
        names = [phase for phase, _ in self._phases]
        if name in names:
            del self._phases[names.index(name) :]
        self.phase = self._phases[-1][0] if self._phases else name
        if not self._phases:
            self.share = 1.0
        self._measure()

    def _measure(self) -> None:
        """Of each phase its done steps, and of the step under way the share that the phase inside it has done."""
        share = 0.0
        for name, steps in reversed(self._phases):
            share = min(1.0, (self._done.get(name, 0) + share) / steps)
        self.share = max(self.share, share)


def causes(errors: list[str]) -> list[str]:
    """The errors without those that tell of a missing driver, where there are others.

    TensorRT-RTX builds without a driver, and after any other error it also complains that there is none.
    """
    others = [error for error in errors if not _NO_DRIVER.search(error)]
    return others or errors


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def start_log(file: Path) -> None:
    """Make an empty log file, before a long build.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.write_text("", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the log {file} cannot be written ({error.strerror}): choose another place") from error


def append_log(file: Path, lines: list[str]) -> None:
    """Add lines to a log file."""
    with file.open("a", encoding="utf-8", errors="replace") as stream:
        stream.writelines(f"{line}\n" for line in lines)
