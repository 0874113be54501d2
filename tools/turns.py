"""Candidates that are timed in turn, each in a process of its own.

Torch, ONNX Runtime and OpenVINO in one process slow each other, and a machine that others use is never the same twice.
So each candidate lives in a process, the processes wait, and one call of each is asked for after another: what slows
the machine slows all of them, and the ratios of the medians hold.

A process is started by ``Turn.start`` and answers each line it is sent with a line of JSON, numbers by name; its part
is ``serve``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, float]


class Ended(RuntimeError):
    """A candidate's process ended without an answer; the text is its last words."""


@dataclass
class Turn:
    """One candidate's process, and the figures of its calls."""

    name: str
    process: subprocess.Popen[str]
    calls: list[Figures] = field(default_factory=list)

    @staticmethod
    def start(name: str, arguments: list[str], threads: int, python: str = sys.executable) -> Turn:
        """Start ``python -m`` with the arguments; the process sees ``threads`` threads."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [python, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return Turn(name, process)

    def ask(self) -> Figures:
        """One call's figures.

        Raises:
            Ended: the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self._last_words()) from None
        while answer := self.process.stdout.readline():
            if answer.startswith("{"):  # libraries print lines of their own
                figures: Figures = json.loads(answer)
                return figures
        raise Ended(self._last_words())

    def call(self) -> Figures:
        """``ask``, and keep the figures."""
        self.calls.append(self.ask())
        return self.calls[-1]

    def median(self, figure: str) -> float:
        """Median of a figure over the calls that were kept."""
        return median(call[figure] for call in self.calls)

    def stop(self) -> None:
        """Let the process end."""
        if self.process.poll() is None:
            self.process.communicate()

    def _last_words(self) -> str:
        assert self.process.stderr is not None
        self.process.wait()
        lines = [line for line in self.process.stderr.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.process.returncode}"


def in_turn(turns: list[Turn], rounds: int, warm: int = 1, patience: float = float("inf")) -> dict[str, str]:
    """``rounds`` calls of each, in turn; the processes end.

    Args:
        warm: calls that do not count, first. patience: seconds of a call beyond which one round is enough for it.

    Returns:
        Why, by name, for each candidate that ended on its way; it has no figures then.
    """
    failed: dict[str, str] = {}
    try:
        for number in range(-warm, rounds):
            for turn in turns:
                done = number > 0 and turn.calls and turn.calls[0]["seconds"] > patience
                if turn.name in failed or done:
                    continue
                try:
                    turn.call() if number >= 0 else turn.ask()
                except Ended as end:
                    failed[turn.name] = str(end)
                    turn.calls.clear()
    finally:
        for turn in turns:
            turn.stop()
    return failed


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Clocks by name; with one thread, the processor's is the one to read where other programs run, too."""


def peak_memory() -> float:
    """Largest resident memory of this process so far, bytes; files mapped into it are counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):  # getrusage's figure starts at the parent's
            return float(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's peak memory")


def serve(call: Callable[[], Figures | None]) -> None:
    """The process's part: a call a line, its seconds of the clock and of the processor printed with what it gave."""
    for _ in sys.stdin:
        began, worked = time.perf_counter(), time.process_time()
        figures = call()
        spent = {"seconds": time.perf_counter() - began, "processor": time.process_time() - worked}
        print(json.dumps({**spent, **(figures or {})}), flush=True)
