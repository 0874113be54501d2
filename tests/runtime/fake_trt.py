"""TensorRT without TensorRT: modules whose surface is the real bindings', read from ``tests/data/trt_api``.

A name that the real binding of that version lacks raises AttributeError here, on reading and on setting, so that code
which uses a removed flag or method fails its test. The names are the bindings' own (``dir()``); what they do is written
in ``fake_trt_building.py`` and ``fake_trt_running.py``, and only the names that the version has get a behaviour.

    trt = make_trt("tensorrt-10.3", sm=87)        # the module; trt.fake is its FakeState
    install(monkeypatch, trt)                     # import tensorrt gives it
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

API = Path(__file__).parent.parent / "data" / "trt_api"
VERSIONS = {
    "tensorrt-10.3": "10.3.0",
    "tensorrt-10.16": "10.16.1.11",
    "tensorrt-11.4": "11.4.0.8",
    "tensorrt_rtx-1.7": "1.7.1.116",
}
FULL = tuple(name for name in VERSIONS if name.startswith("tensorrt-"))
# What each version's ONNX parser takes: highest opset, and operators that it lacks.
_NEW = ("Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter")
OPSETS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tensorrt-10.3": (20, _NEW),
    "tensorrt-10.16": (24, ()),
    "tensorrt-11.4": (25, ()),
    "tensorrt_rtx-1.7": (25, ()),
}


@dataclass
class Execution:
    """One ``execute_async_v3``: what a test's stand-in for the GPU has to compute.

    Attributes:
        model: the ONNX model's bytes; ``run_onnx`` computes it.
        inputs, outputs: name -> (address, shape, NumPy dtype).
        stream: the stream's handle.
        profile: index of the optimisation profile.
        context: the execution context; ``_changes`` counts what was set, ``_settled`` tells that it ran since the
            last change of a shape.
    """

    model: bytes
    inputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    outputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    stream: int
    profile: int
    context: Any = None


def _no_gpu_memory(execution: Execution) -> bool:
    raise AssertionError("set trt.fake.execute to run an engine: the fake has no GPU memory of its own")


@dataclass
class FakeState:
    """What a test sets and reads; ``module.fake``.

    Attributes:
        api: "tensorrt-10.3"; ``version`` the module's version.
        sm: the GPU's compute capability times ten, None for a machine without one.
        execute: called for ``execute_async_v3``; what it returns is what that returns.
        on_step: called before each step that a build reports, with the phase and the step.
        build_says: (severity name, message) lines; when there are any, a build logs them and gives None.
        parse_says: errors of the parser: (operator, node, description).
        layers: how many layers an engine has, per ONNX node.
        calls: what was called, in order: ("set_flag", "TF32"), ("set_memory_pool_limit", "WORKSPACE", 1024), ...
    """

    api: str
    version: str
    sm: int | None = 89
    execute: Callable[[Execution], bool] = _no_gpu_memory
    on_step: Callable[[str, int], None] | None = None
    build_says: list[tuple[str, str]] = field(default_factory=list)
    parse_says: list[tuple[str, str, str]] = field(default_factory=list)
    layers: float = 0.5
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.api.startswith("tensorrt_rtx")

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of ``name``."""
        return [call[1:] for call in self.calls if call[0] == name]


def make_trt(api: str, sm: int | None = 89, version: str | None = None) -> Any:
    """A module with the surface of ``api`` (a key of ``VERSIONS``) on a machine whose GPU is ``sm``."""
    surface: dict[str, list[str] | None] = json.loads((API / f"{api}.json").read_text(encoding="utf-8"))
    state = FakeState(api, version or VERSIONS[api], sm)
    module: Any = types.ModuleType(api.partition("-")[0])
    module.__version__ = state.version
    module.fake = state
    for name, members in surface.items():
        if members is None:
            setattr(module, name, _Bare(name))
        elif {"name", "value"} <= set(members):
            setattr(module, name, _enum(name, members))
    from fake_trt_behaviour import CLASSES, FUNCTIONS

    for name, function in FUNCTIONS.items():
        if name in surface:
            setattr(module, name, function)
    for name, members in surface.items():
        if members is not None and not hasattr(module, name):
            setattr(module, name, _sealed(name, members, CLASSES.get(name), module))
    unknown = sorted(set(CLASSES) - set(surface) - {"EngineValidity", "ComputeCapability", "IRuntimeConfig"})
    assert not unknown, f"behaviour of classes that {api} does not have: {unknown}"
    return module


def install(monkeypatch: pytest.MonkeyPatch, module: Any) -> Any:
    """Make ``import tensorrt`` (or ``tensorrt_rtx``) give the fake module; returned for convenience."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def uninstall(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make the modules ``names`` absent, however they are installed (a None in ``sys.modules`` would say otherwise)."""

    class Absent:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [key for key in sys.modules if key.partition(".")[0] in names]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])


def run_onnx(model: bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's outputs by ONNX Runtime on the CPU: what a fake engine computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


class _Bare:
    """A member that exists and has no behaviour here: using it says so."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"the fake has no behaviour for {self._name}: write it in fake_trt_*.py")


def _enum(name: str, members: list[str]) -> Any:
    """An enumeration with the members of the surface; its numbers are ours, but for STRONGLY_TYPED."""
    names = [member for member in sorted(members) if member == member.upper()]
    numbers = {member: index for index, member in enumerate(names)}
    if name == "NetworkDefinitionCreationFlag" and len(names) == 1:
        numbers = {names[0]: 0}
    return enum.IntEnum(name, numbers)  # type: ignore[misc]


def _sealed(name: str, members: list[str], behaviour: type | None, module: Any) -> type:
    """A class with exactly the public ``members``; behaviours of other names are left out.

    A class that a program derives from it (a logger, a progress monitor) may hold what it likes.
    """
    namespace: dict[str, Any] = {}
    if behaviour is not None:
        for kind in reversed(behaviour.__mro__[:-1]):
            mine = {key: value for key, value in vars(kind).items() if key.startswith("_") or key in members}
            namespace.update({key: value for key, value in mine.items() if key not in ("__dict__", "__weakref__")})
    for member in members:
        namespace.setdefault(member, _Bare(f"{name}.{member}"))

    def set_attribute(self: Any, key: str, value: Any) -> None:
        if type(self) is made and not key.startswith("_") and key not in members:
            raise AttributeError(f"{name!r} object has no attribute {key!r}")
        object.__setattr__(self, key, value)

    namespace |= {"__setattr__": set_attribute, "_trt": module, "_state": module.fake, "__module__": module.__name__}
    made = type(name, (bytes,) if behaviour is not None and issubclass(behaviour, bytes) else (), namespace)
    return made
