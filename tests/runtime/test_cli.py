"""The command line as a person and a script meet it: answers on stdout, one sentence on stderr, exit codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from golden import golden_bundle
from PIL import Image

from svdprune.runtime import Vlm, load
from svdprune.runtime.cli.app import COMMANDS, group, load_command
from svdprune.runtime.targets import TARGETS


@pytest.fixture
def svdprune():
    """Call the command line in this process."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(group, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A picture on disk."""
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    tiny.picture().save(path)
    return path


@pytest.fixture(scope="session")
def right_bundle(bundle, tmp_path_factory):
    """The tiny bundle with its golden case."""
    return golden_bundle(bundle, tmp_path_factory.mktemp("golden") / "right")


def failed(result, code, *words):
    """The result is one sentence on stderr with all of ``words``, and ``code``."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("svdprune: "), result.stderr
    for word in words:
        assert word in lines[0], result.stderr


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_help(svdprune, command, option):
    result = svdprune(*command, option)
    assert result.exit_code == 0 and "Usage: " in result.stdout
    for name in COMMANDS if not command else ():
        assert re.search(rf"^  {name} +\w.*[.]$", result.stdout, re.M)  # a short help that is not cut off


def test_help_and_targets_need_no_heavy_package():
    heavy = ("torch", "transformers", "onnxruntime", "onnx", "PIL", "tokenizers", "numpy")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from click.testing import CliRunner
from svdprune.runtime.cli.app import COMMANDS, group
helps = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
for arguments in [*helps, ["targets"], ["targets", "a100"]]:
    result = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_or_option_is_a_usage_error(svdprune):
    assert svdprune("prune").exit_code == 2
    assert svdprune("run", "--nonsense").exit_code == 2
    assert svdprune("run", "bundle").exit_code == 2  # --image is missing


# ---- targets ---------------------------------------------------------------------------------------------------------


def test_targets_lists_every_row(svdprune):
    result = svdprune("targets")
    assert result.exit_code == 0
    for name, row in TARGETS.items():
        assert name in result.stdout and row.device in result.stdout
    listed = json.loads(svdprune("targets", "--json").stdout)
    assert [row["name"] for row in listed] == list(TARGETS)


@pytest.mark.parametrize("name", ["", *TARGETS])
def test_targets_fit_a_window_of_80_columns(svdprune, name):
    result = svdprune("targets", *name.split())
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 80


def test_a_target_names_the_releases_of_a_rule(svdprune):
    said = " ".join(svdprune("targets", "jetson-orin").stdout.split())
    assert "There is no Attention operator yet. [JetPack 6.2]" in said
    assert "Matrix factorisations are not imported. data-dependent" in said  # of all: none is named
    assert "TensorRT-RTX does not build for it" in said and "[TensorRT-RTX]" not in said
    assert "[TensorRT-RTX]" in svdprune("targets", "rtx-40").stdout


@pytest.mark.parametrize("name", ["jetson-orin-nano", "jetson-orin-nx", "jetson-orin"])
@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_orin_refuses_fp8_and_fp4_with_the_reason(svdprune, name, precision):
    failed(svdprune("targets", name, "--precision", precision), 2, f"{name} cannot run {precision}", "is sm 87", "int8")
    assert svdprune("targets", name, "--precision", "int8").exit_code == 0
    assert svdprune("targets", "--precision", "int8").exit_code == 2  # of which target?


def test_one_target_in_full(svdprune):
    result = svdprune("targets", "jetson-orin")
    for words in ("JetPack 6.2", "10.3", "3.10", "JetPack 7.2", "10.16", "ScatterND", "64 GB shared"):
        assert words in result.stdout
    row = json.loads(svdprune("targets", "jetson-orin", "--json").stdout)
    assert row["sm"] == 87 and row["memory_shared"] is True and row["fp8_tflops"] is None


def test_an_unknown_target_suggests(svdprune):
    failed(svdprune("targets", "jetson-oren"), 2, "unknown target 'jetson-oren'", "did you mean jetson-orin", "rtx-50")


# ---- run -------------------------------------------------------------------------------------------------------------


def test_run_streams_the_answer_and_draws_the_kept_tokens(svdprune, bundle, picture, tmp_path):
    kept = tmp_path / "kept.png"
    arguments = ("run", bundle, "--image", picture, "--prompt", "hi", "--max-new-tokens", 6, "--threads", 1)
    result = svdprune(*arguments, "--picture", kept)
    assert result.exit_code == 0, result.stderr
    expected = load(bundle, threads=1).ask(picture, "hi", max_new_tokens=6)
    assert result.stdout == expected.text + "\n"
    assert f"{tiny.KEEP} of {tiny.TOKENS} vision tokens" in result.stderr and str(kept) in result.stderr
    with Image.open(kept) as drawn:
        assert drawn.width > drawn.height
    assert svdprune(*arguments).stdout == result.stdout


def test_run_json_holds_the_whole_answer(svdprune, bundle, picture):
    result = svdprune("run", bundle, "--image", picture, "--prompt", "hi", "--max-new-tokens", 4, "--json")
    answer = json.loads(result.stdout)
    expected = load(bundle, threads=1).ask(picture, "hi", max_new_tokens=4)
    assert answer["text"] == expected.text and answer["token_ids"] == expected.token_ids
    assert answer["kept_indices"] == expected.kept_indices.tolist() and len(answer["scores"]) == tiny.TOKENS
    assert answer["tokens"]["vision_kept"] == tiny.KEEP and answer["tokens"]["generated"] == len(expected.token_ids)
    assert answer["grid"] == [tiny.ROWS, tiny.ROWS] and answer["stopped"] in ("eos", "length")
    assert len(answer["seconds"]["decode"]) == len(expected.token_ids) - 1 and answer["picture"] is None


def test_sampling_options_reach_the_model(svdprune, bundle, picture):
    base = ("run", bundle, "--image", picture, "--prompt", "hi", "--max-new-tokens", 12, "--json", "--temperature", 5)
    answers = {seed: json.loads(svdprune(*base, "--seed", seed).stdout)["token_ids"] for seed in (1, 2)}
    assert answers[1] != answers[2]
    assert json.loads(svdprune(*base, "--seed", 1).stdout)["token_ids"] == answers[1]
    greedy = json.loads(svdprune(*base, "--seed", 1, "--top-k", 1).stdout)["token_ids"]
    assert greedy == load(bundle, threads=1).ask(picture, "hi", max_new_tokens=12).token_ids


def test_positions_can_be_chosen(svdprune, bundle, picture):
    arguments = ("run", bundle, "--image", picture, "--prompt", "hi", "--json", "--max-new-tokens", 2)
    assert json.loads(svdprune(*arguments, "--positions", "original").stdout)["positions"] == "original"
    failed(svdprune(*arguments, "--positions", "sideways"), 2, "sideways", "compact")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-new-tokens", 0), ("max_new_tokens",)),
        (("--temperature", -1), ("temperature",)),
        (("--top-p", 2), ("top_p",)),
        (("--vision-backend", "onnxrun"), ("onnxrun", "onnxruntime")),
        (("--decoder-backend", "llama"), ("llama", "transformers")),
        (("--decoder-backend", "transformers"), ("checkpoint",)),
        (("--picture", "kept.docx"), ("kept.docx", ".png")),
        (("--picture", "no/such/folder/kept.png"), ("no folder",)),
    ],
)
def test_options_out_of_range(svdprune, bundle, picture, options, words):
    failed(svdprune("run", bundle, "--image", picture, "--prompt", "hi", *options), 2, *words)


@pytest.mark.parametrize("question", ["", "   ", "look: <image>"])
def test_questions_that_cannot_be_asked(svdprune, bundle, picture, question):
    failed(svdprune("run", bundle, "--image", picture, "--prompt", question), 2, "question")


def test_a_question_longer_than_the_context(svdprune, bundle, picture):
    result = svdprune("run", bundle, "--image", picture, "--prompt", "word " * tiny.CONTEXT)
    failed(result, 2, f"the model's context is {tiny.CONTEXT}")


def bad_pictures(folder):
    """Pictures that cannot be used, by what is wrong with them, and a word of the sentence."""
    whole = folder / "whole.png"
    tiny.picture(size=(300, 300)).save(whole)
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "words.png").write_text("this is no picture")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return {
        "missing.png": "missing.png",
        "empty.png": "empty",
        "cut.png": "damaged or cut short",
        "words.png": "words.png",
        "huge.png": "megapixels allowed",
        ".": "folder",
    }


def test_pictures_that_cannot_be_used(svdprune, bundle, tmp_path):
    for name, word in bad_pictures(tmp_path).items():
        failed(svdprune("run", bundle, "--image", tmp_path / name, "--prompt", "hi"), 2, word)


def test_pictures_that_are_odd_and_fine(svdprune, bundle, tmp_path):
    frames = [tiny.picture(seed) for seed in (1, 2)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1), (9, 99, 199)).save(tmp_path / "dot.png")
    for name, note in (("animated.gif", "svdprune: note: "), ("dot.png", "")):
        result = svdprune("run", bundle, "--image", tmp_path / name, "--prompt", "hi", "--max-new-tokens", 1)
        assert result.exit_code == 0 and note in result.stderr
    assert "site-packages" not in result.stderr and "Warning" not in result.stderr


def test_nan_in_the_features_is_an_error_not_an_answer(svdprune, tmp_path, picture):
    poisoned = tiny.make_bundle(tmp_path / "poisoned", poison="features")
    Image.new("RGB", (30, 30)).save(tmp_path / "black.png")
    black, kept = tmp_path / "black.png", tmp_path / "k.png"
    result = svdprune("run", poisoned, "--image", black, "--prompt", "hi", "--picture", kept)
    failed(result, 1, "NaN or infinity")
    assert result.stdout == "" and not kept.exists()


def test_run_takes_several_pictures_and_draws_them_all(svdprune, bundle, picture, tmp_path):
    tiny.picture(7).save(tmp_path / "other.png")
    both = ("run", bundle, "--image", picture, "--image", tmp_path / "other.png", "--prompt", "hi", "--json")
    result = svdprune(*both, "--max-new-tokens", 4, "--picture", tmp_path / "kept.png")
    answer = json.loads(result.stdout)
    expected = load(bundle, threads=1).ask([picture, tmp_path / "other.png"], "hi", max_new_tokens=4)
    assert answer["token_ids"] == expected.token_ids and answer["budget"] == "picture"
    assert answer["tokens"]["vision_kept"] == 2 * tiny.KEEP and len(answer["scores"]) == 2 * tiny.TOKENS
    assert [len(each["kept_indices"]) for each in answer["pictures"]] == [tiny.KEEP] * 2
    assert answer["kept_indices"][tiny.KEEP] == tiny.TOKENS + answer["pictures"][1]["kept_indices"][0]
    one = svdprune("run", bundle, "--image", picture, "--prompt", "hi", "--picture", tmp_path / "one.png")
    assert "of 2 pictures" not in one.stderr
    with Image.open(tmp_path / "kept.png") as drawn, Image.open(tmp_path / "one.png") as alone:
        assert drawn.height > 1.5 * alone.height


def test_run_takes_the_frames_of_a_video(svdprune, bundle, tmp_path):
    frames = [tiny.picture(seed) for seed in range(6)]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"frame{number * 3}.png")
    asked = ("run", bundle, "--prompt", "hi", "--max-new-tokens", 3, "--json")
    result = svdprune(*asked, "--video", tmp_path / "frames", "--frames", 3)
    expected = load(bundle, threads=1).ask([frames[n] for n in (0, 2, 4)], "hi", max_new_tokens=3)
    assert json.loads(result.stdout)["token_ids"] == expected.token_ids
    failed(svdprune(*asked), 2, "Give --image", "--video")
    failed(svdprune(*asked, "--video", "x.gif", "--image", "y.png"), 2, "--video")
    failed(svdprune(*asked, "--image", "y.png", "--frames", 3), 2, "--frames")
    failed(svdprune(*asked, "--video", "film.mp4"), 2, "ffmpeg")


def test_a_chat_on_a_terminal_takes_more_pictures(bundle, picture, tmp_path, monkeypatch):
    tiny.picture(7).save(tmp_path / "other.png")
    monkeypatch.setattr("svdprune.runtime.cli.run._on_terminal", lambda: True)
    lines = ["what?", "/image nowhere.png", "and?", f"/image {tmp_path / 'other.png'}", "and this?", ""]
    typed = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    arguments = [str(bundle), "--image", str(picture), "--max-new-tokens", "3"]
    result = CliRunner().invoke(load_command("run"), arguments, catch_exceptions=False)
    chat = load(bundle, threads=1).chat(picture)
    told = [chat.ask("what?", max_new_tokens=3).text]
    told.append(chat.ask("and this?", max_new_tokens=3, images=tmp_path / "other.png").text)
    assert result.stdout == "".join(f"{text}\n" for text in told)
    assert "there is no picture at nowhere.png" in result.stderr


def test_without_a_question_and_a_terminal_there_is_nothing_to_do(svdprune, bundle, picture):
    failed(svdprune("run", bundle, "--image", picture), 2, "--prompt")


def test_a_chat_encodes_the_picture_once(bundle, picture, monkeypatch):
    seen = []
    encode = Vlm._see_whole
    monkeypatch.setattr(Vlm, "_see_whole", lambda self, image: seen.append(image) or encode(self, image))
    monkeypatch.setattr("svdprune.runtime.cli.run._on_terminal", lambda: True)
    questions = iter(["what?", "and now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    arguments = [str(bundle), "--image", str(picture), "--max-new-tokens", "3"]
    result = CliRunner().invoke(load_command("run"), arguments, catch_exceptions=False)
    assert result.exit_code == 0 and len(seen) == 1
    vlm = load(bundle, threads=1)
    chat = vlm.chat(vlm.see(picture))
    assert result.stdout == "".join(f"{chat.ask(q, max_new_tokens=3).text}\n" for q in ("what?", "and now?"))


def test_ctrl_c_says_a_word_and_leaves_with_130(svdprune, bundle, picture, monkeypatch):
    def interrupted(self, image):
        raise KeyboardInterrupt

    monkeypatch.setattr(Vlm, "_see_whole", interrupted)
    result = svdprune("run", bundle, "--image", picture, "--prompt", "hi")
    assert result.exit_code == 130 and result.stderr.strip() == "svdprune: stopped"


# ---- bundles that cannot be used -------------------------------------------------------------------------------------


@pytest.fixture(params=["run", "verify", "inspect"])
def on_bundle(request, svdprune, picture):
    """Each command that opens a bundle."""
    rest = ("--image", picture, "--prompt", "hi") if request.param == "run" else ()
    return lambda path: svdprune(request.param, path, *rest)


def test_a_bundle_that_is_not_there(on_bundle, tmp_path):
    failed(on_bundle(tmp_path / "none"), 2, "no bundle at")
    (tmp_path / "file").touch()
    failed(on_bundle(tmp_path / "file"), 2, "a bundle is a folder")
    (tmp_path / "folder").mkdir()
    failed(on_bundle(tmp_path / "folder"), 2, "manifest.json")


def test_a_bundle_with_a_missing_or_changed_file(on_bundle, bundle, tmp_path):
    for number, name in enumerate(("vision.onnx", "decoder/embed_tokens.npy")):
        copy = tmp_path / f"missing{number}"
        shutil.copytree(bundle, copy)
        (copy / name).unlink()
        failed(on_bundle(copy), 2, name)
        copy = tmp_path / f"changed{number}"
        shutil.copytree(bundle, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        failed(on_bundle(copy), 2, name)


def test_a_bundle_of_a_newer_schema(on_bundle, bundle, tmp_path):
    copy = tmp_path / "newer"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["schema"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    failed(on_bundle(copy), 2, "newer svdprune", "upgrade")


# ---- verify and inspect ----------------------------------------------------------------------------------------------


def test_verify_shows_each_stage(svdprune, right_bundle):
    result = svdprune("verify", right_bundle, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    for words in ("kept tokens", "vision features", "first-step logits", "answer", "cosine", "max error"):
        assert words in result.stdout
    assert "OUT OF TOLERANCE" not in result.stdout
    report = json.loads(svdprune("verify", right_bundle, "--json").stdout)
    assert report["passed"] is True and len(report["stages"]) == 4


def test_verify_leaves_with_1_when_a_stage_is_out(svdprune, bundle, tmp_path):
    wrong = golden_bundle(bundle, tmp_path / "wrong", logits=np.linspace(-1, 1, tiny.VOCAB, dtype=np.float32))
    result = svdprune("verify", wrong)
    failed(result, 1, "out of tolerance: first-step logits", "do not use this bundle")
    assert "OUT OF TOLERANCE" in result.stdout
    result = svdprune("verify", wrong, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["passed"] is False


def test_inspect_says_what_a_bundle_holds(svdprune, bundle):
    result = svdprune("inspect", bundle)
    assert result.exit_code == 0
    for words in ("tiny (llava)", f"{tiny.TOKENS} -> {tiny.KEEP} (25.0%)", "norm", "compact", "vision.onnx", "sha256"):
        assert words in result.stdout
    held = json.loads(svdprune("inspect", bundle, "--json").stdout)
    assert held["vision"]["keep"] == tiny.KEEP and held["vision_nodes"]["encoder and selection"] > 5
    assert held["files"]["vision.onnx"]["size"] == (bundle / "vision.onnx").stat().st_size


def test_inspect_without_onnx_says_so(svdprune, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = svdprune("inspect", bundle)
    assert result.exit_code == 0 and "onnx is not installed" in result.stdout
    assert json.loads(svdprune("inspect", bundle, "--json").stdout)["vision_nodes"] is None
