"""``build.sh`` of a bundle: the step that is left to do on the device, as a POSIX shell script."""

from __future__ import annotations

import shlex
from pathlib import Path

from svdprune.runtime.decoder import row_shapes
from svdprune.runtime.manifest import DecoderInfo, Manifest, VisionInfo
from svdprune.runtime.targets import Target
from svdprune.runtime.traps import parse_version

BUILD_SCRIPT = "build.sh"

_TEMPLATE = r"""#!/bin/sh
# Builds the TensorRT engines of this bundle, on the machine that will run them.
#
#   sh build.sh [OPTIONS OF svdprune build]       the engines that svdprune runs, tested against the golden case
#   sh build.sh --trtexec [OPTIONS OF trtexec]    the same graphs by trtexec, into the working folder: to time only
#   sh build.sh --python PYTHON ...               the Python that has svdprune and TensorRT (default: python3)
#
# Target @TARGET@: @DEVICE@, sm @SM@.
# The graphs were checked for @CHECKED@.
#
# By trtexec, in the bundle's folder (TensorRT 11 has no --stronglyTyped, there it is always so):
@COMMENTS@
set -eu

python=python3
by_trtexec=no
releases='@RELEASES@'  # major * 1000 + minor, the oldest first
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)

fail() {
    printf 'build.sh: %s\n' "$1" >&2
    exit 2
}

note() {
    printf 'build.sh: note: %s\n' "$1" >&2
}

# check_release MAJOR MINOR: refuse a TensorRT older than any that the graphs were checked for.
check_release() {
    case "$1$2" in
        '' | *[!0-9]*) fail "the version of TensorRT was not understood: $1.$2" ;;
    esac
    number=$(($1 * 1000 + $2))
    oldest=${releases%% *}
    if [ "$number" -lt "$oldest" ]; then
        fail "this is TensorRT $1.$2, and the bundle for @TARGET@ needs @OLDEST@ or newer: @UPDATE@"
    fi
    case " $releases " in
        *" $number "*) ;;
        *) note "this is TensorRT $1.$2, the graphs were checked for @CHECKED@" ;;
    esac
}

# version_of MODULE: print its version; or print why it cannot be imported, and fail.
version_of() {
    "$python" -c 'import importlib, sys
try:
    print(getattr(importlib.import_module(sys.argv[1]), "__version__", ""))
except (ImportError, OSError, RuntimeError) as error:
    print(error)
    sys.exit(1)' "$1"
}

build_by_svdprune() {
    command -v "$python" >/dev/null || fail "there is no $python: name a Python with --python"
    said=$(version_of svdprune.runtime) ||
        fail "$python cannot import svdprune ($said): pip install svdprune, or name another Python with --python"
    if said=$(version_of tensorrt); then
        rest=${said#*.}
        check_release "${said%%.*}" "${rest%%.*}"
    elif [ @RTX@ = no ] || ! version_of tensorrt_rtx >/dev/null; then
        fail "$python cannot import TensorRT ($said): @INSTALL@"
    fi
    exec "$python" -c 'import sys
from svdprune.runtime.cli import main
sys.argv[0] = "svdprune"
main()' build "$here" "$@"
}

build_by_trtexec() {
    trtexec=$(command -v trtexec || command -v /usr/src/tensorrt/bin/trtexec) ||
        fail "there is no trtexec on the path: @INSTALL_TRTEXEC@"
    help=$("$trtexec" --help 2>&1) || true  # what it says decides
    number=$(printf '%s\n' "$help" | sed -n 's/.*\[TensorRT v\([0-9][0-9]*\)\].*/\1/p' | head -n 1)
    [ -n "$number" ] || fail "$trtexec does not say its version"
    major=$((number / 10000))
    minor=$((number / 100 % 100))
    if [ "$major" -eq 0 ]; then  # TensorRT 8 wrote its version in four digits
        major=$((number / 1000))
        minor=$((number / 100 % 10))
    fi
    check_release "$major" "$minor"
    typed=
    case "$help" in
        *--stronglyTyped*) typed=--stronglyTyped ;;
    esac
@COMMANDS@
}

while [ $# -gt 0 ]; do
    case "$1" in
        --trtexec) by_trtexec=yes ;;
        --python)
            [ $# -ge 2 ] || fail "--python needs the path of a Python"
            python=$2
            shift
            ;;
        -h | --help)
            sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *) break ;;
    esac
    shift
done
if [ "$by_trtexec" = yes ]; then
    build_by_trtexec "$@"
else
    build_by_svdprune "$@"
fi
"""


def write_build_script(folder: Path, target: Target, manifest: Manifest) -> Path:
    """Write ``build.sh`` into a bundle's folder and make it executable.

    Args:
        target: one with TensorRT.
        manifest: the bundle's; its ``files`` may still be empty.

    Returns:
        The script's path.

    Raises:
        ValueError: the target has no TensorRT.
        OSError: the file cannot be written.
    """
    place = folder / BUILD_SCRIPT
    place.write_text(build_script(target, manifest), encoding="utf-8", newline="\n")
    place.chmod(0o755)
    return place


def build_script(target: Target, manifest: Manifest) -> str:
    """The text of ``build.sh``."""
    if not target.releases:
        raise ValueError(f"{target.name} has no TensorRT to build for")
    names = [release.title for release in target.releases]
    checked = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    jetson = bool(target.memory_shared)
    parts = {"vision": vision_command(manifest.vision)}
    if manifest.decoder.engine is not None:
        parts["decoder"] = decoder_command(manifest.decoder, manifest.vision.keep)
    values = {
        "TARGET": target.name,
        "DEVICE": target.device,
        "SM": str(target.sm),
        "CHECKED": checked,
        "RELEASES": " ".join(str(_number(release.tensorrt)) for release in target.releases),
        "OLDEST": names[0],
        "RTX": "yes" if target.tensorrt_rtx else "no",
        "UPDATE": "update JetPack" if jetson else "install a newer TensorRT",
        "INSTALL": (
            "it comes with JetPack (sudo apt install nvidia-jetpack), and a virtual environment sees it when made with "
            "--system-site-packages"
            if jetson
            else "install TensorRT from NVIDIA's package index"
            + (", or TensorRT-RTX by pip install 'svdprune[rtx]'" if target.tensorrt_rtx else "")
        ),
        "INSTALL_TRTEXEC": "sudo apt install libnvinfer-bin" if jetson else "it comes with TensorRT's archive",
        "COMMENTS": "\n".join(f"#   trtexec --stronglyTyped {shlex.join(words)}" for words in parts.values()),
        "COMMANDS": "\n".join(_command(part, words) for part, words in parts.items()),
    }
    text = _TEMPLATE
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def vision_command(vision: VisionInfo) -> list[str]:
    """Arguments of trtexec for the vision graph, a picture at a time, paths as seen from the bundle."""
    rest = (vision.height, vision.width, 3) if vision.input == "uint8" else (3, vision.height, vision.width)
    tiles, counts = vision.tiles, (1, 1, 1)
    if tiles is not None:
        counts = (tiles.least, tiles.likely, tiles.most)
    shapes: dict[str, list[tuple[int, ...]]] = {"pixels": [(count, *rest) for count in counts]}
    for name, size in tiles.extras.items() if tiles is not None else ():
        shapes[name] = [(count, *size) for count in counts]
    if tiles is not None and tiles.budget == "tile":  # otherwise these are of one fixed shape
        slots = [(count, vision.tokens, tiles.sources) for count in counts]
        shapes |= {"sources": list(slots), "weights": list(slots)}
    return [f"--onnx={vision.file}", "--saveEngine=vision.engine", *_profile(shapes)]


def decoder_command(decoder: DecoderInfo, keep: int) -> list[str]:
    """Arguments of trtexec for the decoder graph: a profile for the prompt, and one for a step of one token."""
    engine = decoder.engine
    if engine is None:
        raise ValueError("the bundle has no decoder graph for engines")

    def shapes(*rows: int) -> list[str]:
        varying = row_shapes(decoder)
        return _profile(
            {
                name: [tuple(n if size == -1 else size for size in shape) for n in rows]
                for name, shape in varying.items()
            }
        )

    likely = min(engine.cache, 2 * keep + 32)  # the picture's tokens, and a question about as long
    # TensorRT-RTX has no attention kernel for a profile of exactly one row: the step's takes two as well.
    prompt, step = shapes(1, likely, engine.cache), shapes(1, 1, 2)
    return [f"--onnx={engine.file}", "--saveEngine=decoder.engine", "--profile=0", *prompt, "--profile=1", *step]


def _profile(shapes: dict[str, list[tuple[int, ...]]]) -> list[str]:
    """``--minShapes``, ``--optShapes`` and ``--maxShapes`` of some inputs."""
    said = []
    for position, name in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = (f"{key}:{'x'.join(map(str, three[position]))}" for key, three in shapes.items())
        said.append(f"--{name}={','.join(sizes)}")
    return said


def _command(part: str, words: list[str]) -> str:
    """The lines of the script that build a part by trtexec."""
    onnx, *rest = words
    line = f'"$trtexec" --onnx="$here"/{onnx.removeprefix("--onnx=")} $typed {shlex.join(rest)} "$@"'
    if part != "decoder":
        return f"    {line}"
    return f"""\
    if [ $((major * 1000 + minor)) -ge 10015 ]; then
        {line}
    else
        note "no decoder engine, its operators came with TensorRT 10.15"
    fi"""


def _number(version: str) -> int:
    major, minor = parse_version(version)
    return major * 1000 + minor
