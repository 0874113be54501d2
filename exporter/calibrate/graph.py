"""`--keep auto` on what is exported: the vision graph's own choice and features, then the whole bundle's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from svdprune.calib.evaluate.bundle import answer
from svdprune.calib.evaluate.outcome import Outcome
from svdprune.calib.keep_curve import KeepCurve, KeepPoint
from svdprune.calib.progress import Progress
from svdprune.calib.quantise.judge import open_quantised, seen_of
from svdprune.calib.statistics import kl_divergence
from svdprune.exporter.calibrate.keep import Asked, Examination, Held, point_of, told
from svdprune.exporter.evaluate.seen import View
from svdprune.exporter.feed import feed_of
from svdprune.exporter.quantise import Quantised
from svdprune.exporter.unfinished import unfinished
from svdprune.exporter.vision_file import GRAPH, VisionFile
from svdprune.runtime.bundle import BundleWriter
from svdprune.runtime.decoder import open_decoder
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.machine import host_memory
from svdprune.runtime.positions import policy_named
from svdprune.runtime.vision import open_vision
from svdprune.runtime.vlm import Vlm

ROOM = 2  # times the size of a bundle's graphs and weights that must be free to run them


class GraphEyes:
    """An exported vision graph on ONNX Runtime, in place of the checkpoint's encoder, selector and projector."""

    def __init__(self, path: Path, maker: VisionFile, examination: Examination) -> None:
        self._maker, self._examination = maker, examination
        # 8 bits for a GPU: as they are written, which is what an engine computes; a CPU's as they will run there.
        as_run = maker.plan is None or maker.plan.for_cpu
        self._session = open_quantised(path, torch.get_num_threads(), as_run)
        self._names = [output.name for output in self._session.get_outputs()]

    def view(self, picture: Asked) -> View:
        """The picture as the graph prunes it.

        Raises:
            NumericalError: NaN or infinity among its outputs.
        """
        model = self._examination.model
        fed = feed_of(picture.image, model.images, self._maker.spec, self._maker.raw)
        outputs = dict(zip(self._names, self._session.run(self._names, fed.inputs), strict=True))
        found = seen_of(fed, outputs)
        if not (np.isfinite(found.features).all() and np.isfinite(found.scores).all()):
            raise NumericalError(
                f"the vision graph gives NaN or infinity in {self._maker.precision}: export with --precision fp32"
            )
        return model.placed(picture.seen, found.kept, torch.from_numpy(found.features), self._examination.positions)


def confirm(
    curve: KeepCurve,
    examination: Examination,
    maker: VisionFile,
    folder: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[KeepCurve, Quantised | None]:
    """Write the vision graph of the curve's K and ask the same questions about what it sees.

    Where its answers agree less than was wished, the next larger K of the grid is taken, for which both the selector in
    torch and the graph agree. The graph of the K that is returned lies in `folder` as `GRAPH`.

    Raises:
        UserError: no graph agrees.
        NumericalError: a graph gives NaN or infinity.
    """
    points = {point.keep: point for point in curve.points}
    judged: list[KeepPoint] = []
    for keep in (count for count in curve.grid if count >= curve.keep):
        if keep not in points:
            points[keep] = examination.at(keep, partial(_tell, progress, f"answers with K = {keep}"))
            say(told(points[keep]))
        if points[keep].agreement < curve.wished:
            continue
        for file in folder.glob(f"{GRAPH}*"):
            file.unlink()
        quantised = maker.write(keep, folder / GRAPH, lambda stage, share: progress(stage, None))
        eyes = GraphEyes(folder / GRAPH, maker, examination)
        step = f"answers with the exported graph, K = {keep}"
        point = examination.point(keep, eyes.view, partial(_tell, progress, step))
        judged.append(point)
        say(f"{told(point)}: the exported vision graph, {maker.precision}")
        if point.agreement >= curve.wished:
            found = dataclasses.replace(
                curve,
                keep=keep,
                points=[points[count] for count in sorted(points)],
                rows=examination.rows(keep),
                precision=maker.precision,
                graph=judged,
            )
            return found, quantised
    best = max(judged, key=lambda point: (point.agreement, point.keep))
    raise UserError(
        f"no K below {curve.tokens} whose exported vision graph ({maker.precision}) reaches an agreement of "
        f"{curve.wished:g} (the best is {best.agreement:.3f} at K = {best.keep}, where the selector in float32 has "
        f"{points[best.keep].agreement:.3f}): lower --agreement"
        + (", or give --precision fp16 or fp32" if maker.plan else "")
    )


def _tell(progress: Progress, step: str, share: float) -> None:
    progress(step, None)


def ask_bundle(curve: KeepCurve, held: Held, vlm: Vlm, progress: Progress) -> KeepCurve:
    """The same questions answered by a bundle's own two graphs, against the unpruned model.

    Raises:
        NumericalError: NaN or infinity in features or logits, with the picture's name.
    """
    outcomes = []
    for number, picture in enumerate(held.pictures):
        progress(f"answers of the bundle, picture {number + 1} of {len(held.pictures)}", None)
        try:
            sight = vlm.see(picture.image)
            for question, said in zip(picture.questions, picture.said, strict=True):
                known = question.answers
                mine = answer(vlm, sight, question.text, held.limit, None if known is not None else said.ids)
                pairs = zip(mine.ids, said.ids, strict=False)
                least = min(len(mine.ids), len(said.ids))
                matched = next((n for n, (a, b) in enumerate(pairs) if a != b), least)
                same = matched == len(said.ids) == len(mine.ids)
                kl = float(kl_divergence(said.first, mine.first))
                score = None if known is None else held.protocol.score(mine.text, known)
                outcomes.append(Outcome(number, question.kind, score, None, float(same), matched / len(said.ids), kl))
        except NumericalError as error:
            raise NumericalError(f"{picture.name}: {error}") from error
    point = point_of(curve.keep, policy_named(curve.positions), outcomes)
    return dataclasses.replace(curve, decoder=vlm.manifest.decoder.precision, bundle=point)


def judge_bundle(bundle: BundleWriter, curve: KeepCurve, held: Held, progress: Progress) -> KeepCurve:
    """`ask_bundle` for a bundle that is being written, whose other files are there; its `keep.json` is written anew.

    A bundle that does not fit the free memory is not asked, and `unmeasured` says so.
    """
    manifest = bundle.manifest
    assert manifest is not None and manifest.calibration is not None and manifest.calibration.keep is not None
    opened = unfinished(bundle.path, manifest)
    parts = (manifest.vision.file, manifest.decoder.file, manifest.decoder.embedding)
    size = sum(info.size for name, info in opened.manifest.files.items() if name.startswith(parts))
    memory = host_memory()
    if memory is not None and ROOM * size > memory.available:
        curve = dataclasses.replace(
            curve,
            unmeasured=f"the bundle's graphs and weights take {size / 1e9:.1f} GB, too much for the free memory here",
        )
    else:
        with ExitStack() as stack:
            vision = open_vision("onnxruntime", opened, verify=False)
            stack.callback(vision.close)
            decoder = open_decoder("onnxruntime", opened, verify=False)
            stack.callback(decoder.close)
            curve = ask_bundle(curve, held, Vlm(opened, vision, decoder, manifest.positions), progress)
    bundle.file(manifest.calibration.keep).write_text(curve.to_json(), encoding="utf-8")
    return curve
