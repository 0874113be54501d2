"""What K tokens save of the language model's work, counted from the config."""

from __future__ import annotations

from svdprune.calib.keep_curve import KeepCurve, Saving
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.estimate.costs import decoder_work, format_of
from svdprune.exporter.estimate.families import read_language
from svdprune.runtime.roofline import machine, stage_time
from svdprune.runtime.targets import Target


def saving_of(curve: KeepCurve, checkpoint: Checkpoint, target: Target) -> Saving:
    """At the chosen K and at all tokens, for a prompt of the questions' mean length, in the target's float type.

    Raises:
        UserError: a language model that the estimate does not know.
    """
    text = read_language(checkpoint.folder.name, checkpoint.config)
    form = format_of("fp32" if target.sm is None else "fp16")
    rows = [count + curve.prompt_tokens for count in (curve.rows or (curve.keep, curve.tokens))]
    works = [decoder_work(text, count, 0, 1, form) for count in rows]
    timed = target.fp16_tflops is not None and target.bandwidth_gbs is not None
    return Saving(
        [float(sum(work.flops for work in group)) for group in works],
        [count * text.cache_row * form.activation_bytes for count in rows],
        [stage_time(group, machine(target)).seconds for group in works] if timed else [],
    )
