"""Export: a checkpoint in, a bundle out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from svdprune.calib.progress import Progress
from svdprune.exporter.build_script import write_build_script
from svdprune.exporter.calibrate.apply import calibration_files, choose_selector
from svdprune.exporter.calibrate.auto import Search, search_keep, wants_search
from svdprune.exporter.calibrate.graph import judge_bundle
from svdprune.exporter.decoder import export_decoder
from svdprune.exporter.decoder.engine_choice import EnginePlan, plan_engine
from svdprune.exporter.decoder.static_export import export_engine_decoder
from svdprune.exporter.families import family_of
from svdprune.exporter.golden import load_reference, write_golden
from svdprune.exporter.processor import image_values, write_processor
from svdprune.exporter.quantise import Asker, Quantised, measured, plan_quantisation
from svdprune.exporter.report import prepare_report, write_report
from svdprune.exporter.request import ExportRequest, ExportSummary
from svdprune.exporter.rules import check_target, refuse_violations
from svdprune.exporter.selection import default_selector, parse_keep
from svdprune.exporter.share import check_engine_graph, open_shared, share_decoder
from svdprune.exporter.source import Source, locate
from svdprune.exporter.tiles import MARKS, check_selector, described, write_marks
from svdprune.exporter.tracing import OPSET
from svdprune.exporter.vision_file import GRAPH, VisionFile, move_graph
from svdprune.runtime.bundle import Bundle, BundleWriter, write_bundle
from svdprune.runtime.bundle_writer import check_bundle_place
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import DecoderInfo, Manifest, ModelInfo, QuantisationInfo, SelectorInfo, VisionInfo
from svdprune.runtime.preprocess import ImageSettings
from svdprune.runtime.targets import check_precision, find_target
from svdprune.runtime.text import TextProcessor

__all__ = ["ExportRequest", "ExportSummary", "export_model"]

WRITERS = ("svdprune", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime")


def export_model(
    request: ExportRequest,
    progress: Progress = lambda stage, share: None,
    say: Callable[[str], None] = lambda line: None,
) -> ExportSummary:
    """Export as `request` says. The bundle appears whole or not at all.

    Args:
        say: told what a search for K measures, a line each.

    Raises:
        UserError: anything about the request, the checkpoint or the place to write that cannot be; a graph that a
            TensorRT release of the target would refuse, with the node, the rule and what avoids it.
    """
    target = find_target(request.target)
    check_precision(target, request.precision)
    progress(f"finding {request.model}", 0.0)
    source = locate(request.model, request.revision)
    checkpoint = source.checkpoint
    family = family_of(checkpoint.config, request.model)
    spec = described(family, checkpoint, request.budget, request.prompt_pictures, request.max_pixels)
    select = request.select or default_selector(spec.tiling is None)
    check_selector(family, spec, select)
    spec = dataclasses.replace(spec, positions=request.positions or spec.positions)
    search = wants_search(request.keep, select, request.search)
    if search and request.budget == "prompt":
        raise UserError("--keep auto asks about one picture at a time: with --budget prompt, give a count")
    asked = {name: getattr(request, name) for name in ("rank", "block", "iterations", "variance", "centre")}
    chosen = choose_selector(select, asked, request.seed, request.calibration, checkpoint, spec)
    selector = chosen.config
    raw = request.input == "uint8"
    images = dataclasses.replace(ImageSettings.from_json(image_values(checkpoint)), tiling=spec.tiling)
    eight_bits = plan_quantisation(
        request.precision,
        target,
        request.calibration_images,
        request.sensitive,
        images,
        spec,
        raw,
        request.seed,
        lambda note: progress(note, 0.05),
    )
    shared = None
    if request.share_decoder_with is not None:
        beside = Path(".") if request.out is None else request.out.parent
        shared = open_shared(request.share_decoder_with, beside, checkpoint, request.decoder_precision)
    maker = VisionFile(checkpoint, family, spec, chosen, request.precision, eight_bits, raw, target)
    with ExitStack() as workshop:
        found = None
        if search:
            if request.out is not None:
                check_bundle_place(request.out, request.overwrite)  # before a search of minutes
            selector.check(tokens=spec.tokens, channels=spec.channels, keep=1)
            scratch = TemporaryDirectory(prefix=".svdprune-", dir=_nearest(request.out))
            found = search_keep(
                maker,
                request.model,
                spec.positions,
                request.search,
                request.seed,
                Path(workshop.enter_context(scratch)),
                progress,
                say,
            )
            keep = found.curve.keep
        else:
            keep = spec.tokens if select == "none" else parse_keep(request.keep, spec.tokens)
        selector.check(tokens=spec.tokens, channels=spec.channels, keep=keep)
        return _write(request, source, maker, images, keep, found, shared, progress)


def _write(
    request: ExportRequest,
    source: Source,
    maker: VisionFile,
    images: ImageSettings,
    keep: int,
    found: Search | None,
    shared: Bundle | None,
    progress: Progress,
) -> ExportSummary:
    """The bundle that keeps `keep` tokens, which `found` found where it was searched, with the decoder of `shared`."""
    checkpoint, family, spec, chosen, target = maker.checkpoint, maker.family, maker.spec, maker.chosen, maker.target
    selector, eight_bits = chosen.config, maker.plan
    out = request.out or Path(f"{source.id.rsplit('/', 1)[-1]}-k{keep}-{target.name}")
    text_config = checkpoint.config["text_config"]
    plan = plan_engine(target, request.decoder_engine, request.cache, text_config, spec.most_rows(keep))
    if shared is not None:
        check_engine_graph(shared, plan)
    curve = found.curve if found else None
    summary = ExportSummary(
        out, spec.tokens, keep, cache=plan.cache, engine_refused=plan.note, curve=curve, selector=chosen
    )
    summary.shared = shared.path if shared else None

    with write_bundle(out, overwrite=request.overwrite) as bundle:
        with _timed(summary, "vision"):
            place = bundle.file(GRAPH)
            if found:
                quantised = found.quantised
                move_graph(found.graph, place)
            else:
                quantised = maker.write(keep, place, progress)
        decoder = _decoder(request, maker, bundle, plan, shared, summary, progress)
        processor = write_processor(
            checkpoint,
            bundle.path / "processor",
            spec.tiling,
            family.picture_text(checkpoint),
            family.chat_template(checkpoint),
        )
        marks = write_marks(family, checkpoint, bundle.path)
        with _timed(summary, "golden"):
            progress("answering the golden question with transformers", 0.7)
            text = TextProcessor.of(processor, lambda name: (bundle.path / name).read_text(encoding="utf-8"))
            reference = load_reference(checkpoint, lambda note: progress(note, 0.75))
            golden = write_golden(
                bundle.path / "golden",
                reference,
                family,
                spec,
                selector,
                keep,
                spec.positions,
                images,
                text,
                decoder,
                chosen.start,
                marks,
            )
            if eight_bits and quantised:
                progress("comparing first tokens with the float vision graph", 0.85)
                asker = Asker(reference, text, decoder, spec.positions, marks)
                summary.quantisation = measured(quantised, eight_bits, asker)
            page = None
            if request.report:
                progress("measuring the energy curve", 0.88)
                given = (request.search.images, request.calibration_images)
                page = prepare_report(reference, family, spec, images, given, chosen.calibration, request.seed)
            del reference
        parts = {"vision": "vision.onnx*", "decoder": "decoder/model.onnx*", "embeddings": decoder.embedding}
        if decoder.engine:
            parts["decoder for engines"] = "decoder/engine.onnx*"
        for name, places in parts.items():
            summary.sizes[name] = sum(f.stat().st_size for f in bundle.path.glob(places))
        bundle.manifest = Manifest(
            model=ModelInfo(source.id, family.name, source.revision, checkpoint.fingerprint()),
            vision=_vision_info(maker, keep, quantised, summary.quantisation, marks is not None),
            decoder=decoder,
            processor=processor,
            positions=spec.positions,
            target=target.name,
            golden=golden,
            calibration=calibration_files(bundle, request.calibration, chosen, curve),
            written_by={name: importlib.metadata.version(name) for name in WRITERS},
        )
        if found and curve:
            with _timed(summary, "answers"):
                summary.curve = judge_bundle(bundle, curve, found.held, progress)
        if target.releases:
            write_build_script(bundle.path, target, bundle.manifest)
        if page is not None:
            with _timed(summary, "report"):
                summary.report = write_report(
                    bundle.path, bundle.manifest, checkpoint, page, lambda stage: progress(stage, 0.9)
                )
        progress("hashing", 0.95)
    summary.sizes["bundle"] = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    progress("done", 1.0)
    return summary


def _decoder(
    request: ExportRequest,
    maker: VisionFile,
    bundle: BundleWriter,
    plan: EnginePlan,
    shared: Bundle | None,
    summary: ExportSummary,
    progress: Progress,
) -> DecoderInfo:
    """The decoder graphs, written or shared; the one for engines is held to the target's rules."""
    checkpoint, spec, target, folder = maker.checkpoint, maker.spec, maker.target, bundle.path / "decoder"
    text_config = checkpoint.config["text_config"]
    with _timed(summary, "decoder"):
        if shared is not None:
            progress(f"sharing the decoder of {shared.path}", 0.4)
            decoder = share_decoder(shared, bundle, plan)
        else:
            progress("writing the decoder", 0.4)
            decoder = export_decoder(
                checkpoint, text_config, folder, request.decoder_precision, deepstack=spec.deepstack, mask=spec.mask
            )
    decoder = dataclasses.replace(decoder, engine_refused=plan.note)
    if plan.cache is None:
        return decoder
    with _timed(summary, "decoder for engines"):
        if decoder.engine is None:
            progress("writing the decoder for engines", 0.55)
            engine = export_engine_decoder(
                checkpoint, text_config, folder, plan.cache, deepstack=spec.deepstack, mask=spec.mask
            )
            decoder = dataclasses.replace(decoder, engine=engine)
        assert decoder.engine is not None
        violations = check_target(bundle.path / decoder.engine.file, target, plan.releases)
        refuse_violations(violations, "decoder graph for engines", target)
    return decoder


def _vision_info(
    maker: VisionFile, keep: int, quantised: Quantised | None, measured: QuantisationInfo | None, marks: bool
) -> VisionInfo:
    """The manifest's entry for the vision graph; `marks`: the bundle has a file of rows between tokens."""
    spec = maker.spec
    return VisionInfo(
        file=GRAPH,
        input="uint8" if maker.raw else "float32",
        height=spec.height,
        width=spec.width,
        grid=list(spec.grid),
        tokens=spec.tokens,
        keep=keep,
        channels=spec.channels,
        hidden=spec.hidden,
        tap=spec.tap,
        precision=maker.precision,
        opset=quantised.opset if quantised else OPSET,
        selector=SelectorInfo(**maker.chosen.manifest_fields()),  # type: ignore[arg-type]
        quantisation=measured,
        tiles=spec.tiles(MARKS if marks else None),
        deepstack=spec.deepstack,
    )


def _nearest(out: Path | None) -> Path:
    """The folder that is there and nearest to the bundle: large files are moved within it, not copied."""
    place = (out or Path("bundle")).absolute().parent
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


@contextmanager
def _timed(summary: ExportSummary, part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    summary.seconds[part] = time.perf_counter() - began
