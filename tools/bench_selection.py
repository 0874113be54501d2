"""Time of choosing the tokens: the scorer in the graph beside the exact SVD and what other methods do.

    python -m tools.bench_selection --write docs/performance.md            # T = 576, D = 1024
    python -m tools.bench_selection --tokens 256,576,1024,2880,5760 --channels 384,1024,1152,4096 --batch 1,8

Every candidate runs in a process of its own (torch and ONNX Runtime in one slow each other) and they take turns, call
by call, on the same features; medians, and ratios to our scorer. Features are drawn with a falling spectrum, a dominant
mean and uneven tokens: the arithmetic does not depend on the values. Overlap is the share of the kept tokens that an
exact float64 choice keeps too, on these features; docs/fidelity.md has it for photographs.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import numpy as np
from rich.progress import Progress

from tools.tables import write_between
from tools.turns import CLOCKS

RANK = 16
COLD = 0.5  # seconds of a call beyond which it does not matter what the caches held
Work = Callable[[], np.ndarray | None]  # one call; the kept indices (B, K) where the candidate chooses tokens


def drawn_features(batch: int, tokens: int, channels: int, seed: int = 0) -> np.ndarray:
    """float32 (B, T, D): singular values that fall like j^-0.7, a mean that dominates, tokens of uneven size."""
    rng = np.random.default_rng(seed)
    falling = np.arange(1, channels + 1) ** -0.7
    size = np.exp(0.3 * rng.standard_normal((batch, tokens, 1)))
    return (rng.standard_normal((batch, tokens, channels)) * falling * size + 0.3 * falling**0.5).astype(np.float32)


def _onnx(selector: str) -> Callable[[np.ndarray, int, int], Work]:
    def make(features: np.ndarray, keep: int, threads: int) -> Work:
        import onnx_ir as ir
        import onnxruntime as ort

        from svdprune.exporter.selection import SelectorConfig, keep_indices, selector_model

        model = selector_model(SelectorConfig(selector, rank=RANK), *features.shape[1:], keep=keep)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda: keep_indices(session.run(None, {"tokens_in": features})[0], keep)

    return make


def _torch(form: Callable[..., object]) -> Callable[[np.ndarray, int, int], Work]:
    def make(features: np.ndarray, keep: int, threads: int) -> Work:
        import torch

        torch.set_num_threads(threads)
        given = torch.from_numpy(features)

        def call() -> np.ndarray | None:
            with torch.inference_mode():
                kept = form(given, keep)
            return None if kept is None else np.sort(np.asarray(kept), axis=1)

        return call

    return make


def exact_svd(features, keep):  # type: ignore[no-untyped-def]
    """The paper's rule by `torch.linalg.svd` in float32."""
    import torch

    left = torch.linalg.svd(features, full_matrices=False)[0][:, :, :RANK]
    return left.square().sum(2).topk(keep, dim=1).indices


def lowrank_svd(features, keep):  # type: ignore[no-untyped-def]
    """The same by `torch.svd_lowrank`, with its default of two iterations and as much oversampling as our block has."""
    import torch

    left = torch.svd_lowrank(features, q=4 * RANK, niter=2)[0][:, :, :RANK]
    return left.square().sum(2).topk(keep, dim=1).indices


def max_min(features, keep):  # type: ignore[no-untyped-def]
    """DivPrune (arXiv 2503.02175): cosine distances of all pairs, then one token after another."""
    import torch

    unit = torch.nn.functional.normalize(features, dim=2)
    distance = 1.0 - unit @ unit.mT
    batch = torch.arange(len(features))
    apart = distance + 3.0 * torch.eye(features.shape[1])
    chosen = [apart.amin(2).argmax(1)]
    nearest = distance[batch, chosen[0]].clone()
    for _ in range(keep - 1):
        nearest[batch, chosen[-1]] = -1.0
        chosen.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distance[batch, chosen[-1]])
    return torch.stack(chosen, 1)


def determinantal(features, keep):  # type: ignore[no-untyped-def]
    """CDPruner's greedy MAP of a determinantal point process (arXiv 2506.10967), cosine kernel, without its text."""
    import torch

    unit = torch.nn.functional.normalize(features, dim=2)
    kernel = unit @ unit.mT
    batch, tokens = features.shape[:2]
    rows = torch.arange(batch)
    gains = torch.diagonal(kernel, dim1=1, dim2=2).clone()
    factors = torch.zeros(keep, batch, tokens)
    chosen = []
    for step in range(keep):
        pick = gains.argmax(1)
        chosen.append(pick)
        past = (factors[:step] * factors[:step, rows, pick][:, :, None]).sum(0)
        factor = (kernel[rows, pick] - past) / gains[rows, pick].clamp_min(1e-12).sqrt()[:, None]
        factors[step] = factor
        gains = gains - factor.square()
        gains[rows, pick] = -torch.inf
    return torch.stack(chosen, 1)


def cls_top(features, keep):  # type: ignore[no-untyped-def]
    """[CLS] attention: the attention is there already, so only the sort is left."""
    features[:, :, 0].topk(keep, dim=1)


CANDIDATES: dict[str, Callable[[np.ndarray, int, int], Work]] = {
    "leverage, ONNX graph": _onnx("leverage"),
    "leverage, torch.linalg.svd": _torch(exact_svd),
    "leverage, torch.svd_lowrank": _torch(lowrank_svd),
    "max-min (DivPrune)": _torch(max_min),
    "DPP (CDPruner)": _torch(determinantal),
    "[CLS] attention, top K": _torch(cls_top),
}
OURS = next(iter(CANDIDATES))
CHOOSES_LEVERAGE = tuple(name for name in CANDIDATES if name.startswith("leverage"))


@dataclass
class Contender:
    """One candidate's process: answers each line it is sent with the seconds of one call."""

    name: str
    process: subprocess.Popen[str]
    kept: Path
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def start(name: str, features: Path, keep: int, threads: int, clock: str, folder: Path) -> Contender:
        kept = folder / f"kept-{len(list(folder.iterdir()))}.npy"
        command = [sys.executable, "-m", "tools.bench_selection", "--worker", name, "--features", str(features)]
        command += ["--keep", str(keep), "--threads", str(threads), "--kept", str(kept)]
        command += ["--clock", clock]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        return Contender(name, process, kept)

    def call(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise click.ClickException(f"the process of {self.name} ended: see its message above")
        return float(answer)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(name: str, features: Path, keep: int, threads: int, kept: Path, clock: str) -> None:
    """The child's part: one call a line, its seconds printed; the first call's choice is saved.

    A short call is timed after another one: other candidates have emptied the caches meanwhile, and in a vision graph
    the features have just been written.
    """
    now, call = CLOCKS[clock], CANDIDATES[name](np.load(features), keep, threads)
    chosen = call()
    if chosen is not None:
        np.save(kept, chosen)
    spent = 0.0
    for _ in sys.stdin:
        if spent < COLD:
            call()
        began = now()
        call()
        spent = now() - began
        print(spent, flush=True)


def exact_choice(features: np.ndarray, keep: int) -> np.ndarray:
    """Kept indices (B, K) by float64 SVD."""
    from svdprune.exporter.selection import keep_indices
    from svdprune.exporter.selection.reference import leverage_scores

    return np.stack([keep_indices(leverage_scores(x, RANK), keep) for x in features])


def measure(
    shape: tuple[int, int, int],
    keep: int,
    threads: int,
    rounds: int,
    clock: str,
    patience: float,
    names: list[str],
    judge: bool,
) -> list[tuple[str, float, float | None]]:
    """(candidate, median seconds, overlap) at one size; one round is enough above `patience` seconds a call."""
    features = drawn_features(*shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "features.npy", features)
        contenders = [Contender.start(n, folder / "features.npy", keep, threads, clock, folder) for n in names]
        for contender in contenders:
            contender.call()  # warm
        for number in range(rounds):
            for contender in contenders:
                if number == 0 or median(contender.seconds) < patience:
                    contender.seconds.append(contender.call())
        for contender in contenders:
            contender.stop()
        exact = exact_choice(features, keep) if judge else None
        found = []
        for contender in contenders:
            overlap = None
            if exact is not None and contender.name in CHOOSES_LEVERAGE:
                kept = np.load(contender.kept)
                shares = [np.intersect1d(a, b).size / keep for a, b in zip(kept, exact, strict=True)]
                overlap = float(np.mean(shares))
            found.append((contender.name, median(contender.seconds), overlap))
    return found


def _sizes(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        sizes = [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list such as 256,576") from None
    if min(sizes) < 1:
        raise click.BadParameter("sizes are 1 or more")
    return sizes


@click.command(help=__doc__)
@click.option("--tokens", default="576", show_default=True, callback=_sizes)
@click.option("--channels", default="1024", show_default=True, callback=_sizes)
@click.option("--batch", default="1", show_default=True, callback=_sizes)
@click.option("--keep", default=64, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True)
@click.option("--patience", default=2.0, show_default=True, help="Seconds a call beyond which one round is enough.")
@click.option("--largest-svd", default=1 << 21, show_default=True, help="T x D beyond which no exact SVD is asked for.")
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose table is replaced.")
@click.option("--section", default="selection", show_default=True, help="Name of the table's markers in it.")
@click.option("--worker", hidden=True)
@click.option("--features", type=click.Path(path_type=Path), hidden=True)
@click.option("--kept", type=click.Path(path_type=Path), hidden=True)
def main(
    tokens: list[int],
    channels: list[int],
    batch: list[int],
    keep: int,
    threads: int,
    rounds: int,
    clock: str,
    patience: float,
    largest_svd: int,
    write: Path | None,
    section: str,
    worker: str | None,
    features: Path | None,
    kept: Path | None,
) -> None:
    if worker is not None:
        assert features is not None and kept is not None
        work(worker, features, keep, threads, kept, clock)
        return
    lines = [
        f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}, K = {keep}, r = {RANK}; medians of "
        f"{rounds} calls in turn{', milliseconds of the processor' if clock == 'processor' else ''}.",
        "",
        "| T | D | batch | candidate | time, ms | beside ours | overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    shapes = [(b, t, d) for t in tokens for d in channels for b in batch]
    with Progress(transient=True) as progress:
        task = progress.add_task("sizes", total=len(shapes))
        for b, t, d in shapes:
            judge = t * d <= largest_svd
            names = [n for n in CANDIDATES if judge or n != "leverage, torch.linalg.svd"]
            found = measure((b, t, d), keep, threads, rounds, clock, patience, names, judge)
            ours = {name: seconds for name, seconds, _ in found}[OURS]
            for name, seconds, overlap in found:
                shown = "" if overlap is None else f"{overlap:.3f}"
                lines.append(f"| {t} | {d} | {b} | {name} | {1e3 * seconds:.2f} | {seconds / ours:.2f} | {shown} |")
            progress.advance(task)
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        write_between(write, section, text)


if __name__ == "__main__":
    main()
