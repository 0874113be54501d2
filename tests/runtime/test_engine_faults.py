"""Known failures of TensorRT and CUDA are told as a sentence with what to do; others are left alone."""

from __future__ import annotations

import re

import pytest

from svdprune.runtime.engines.faults import _FAULTS, explain

# Lines as the libraries print them, and what the user should read.
SEEN = [
    ("libnvinfer.so.10: cannot open shared object file: No such file or directory", "libnvinfer.so.10 is not found"),
    ("libnvonnxparser.so.11: cannot open shared object file: No such file", "libnvonnxparser.so.11 is not found"),
    ("Unable to load library: libnvinfer_builder_resource_sm87.so.10.3.0: cannot", "libnvinfer_builder_resource_sm87"),
    ("libcudart.so.12: cannot open shared object file", "CUDA library libcudart.so.12"),
    ("libcuda.so.1: cannot open shared object file", "no NVIDIA driver"),
    ("CUDA initialization failure with error: 35. Please check your CUDA installation:", "CUDA error 35"),
    ("(cudaError 35: CUDA driver version is insufficient for CUDA runtime version)", "CUDA error 35"),
    ("CUDA initialization failure with error: 100", "CUDA error 100"),
    ("cudaErrorNoDevice: no CUDA-capable device is detected", "finds no GPU"),
    ("Cuda Runtime (system has unsupported display driver / cuda driver combination)", "reboot"),
    ("CUDA-capable device(s) is/are busy or unavailable", "busy or in exclusive use"),
    ("no kernel image is available for execution on the device", "no kernels for this GPU"),
    (
        "Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting compute "
        "8.9 got compute 8.6, please rebuild.)",
        "for another GPU (compute capability 8.6, this one is 8.9)",
    ),
    (
        "The engine plan file is not compatible with this version of TensorRT, expecting library version 10.3.0.26 got "
        "10.7.0.23, please rebuild.",
        "another TensorRT (10.7.0.23, this one is 10.3.0.26)",
    ),
    (
        "Error Code 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version "
        "tag does not match. Note: Current Version: 239, Serialized Engine Version: 236)",
        "serialisation version 236, this one reads 239",
    ),
    (
        "Serialization assertion sizeRead == static_cast<uint64_t>(mEnd - mCurrent) failed.Size specified in header "
        "does not match archive size",
        "truncated or was changed",
    ),
    ("Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match", "not an engine of this"),
    ("The engine header does not conform to the expected format for TensorRT-RTX.", "not an engine of this kind"),
    (
        "Error Code 1: Myelin ([tactic.cpp:1676: enumerate_tactics] Tactic Selection: no tactics to implement the "
        "operation within workspace limit. Consider increase the allowed workspace size if applicable.)",
        "larger --workspace",
    ),
    ("[virtualMemoryBuffer.cpp::resizePhysical::160] Error Code 2: OutOfMemory (no further information)", "ran out"),
    ("Error Code 2: OutOfMemory (Requested size was 10932376 bytes.)", "asked for 10932376 bytes"),
    ("Requested amount of GPU memory (4294967296 bytes) could not be allocated.", "add swap"),
    ("std::bad_alloc", "memory ran out"),
    ("Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)", "lack of it"),
    ("ITensor::getDimensions: node_permute: first input has type UInt8 but must have type Float, Half", "uint8"),
    ("No importer registered for op: TensorScatter. Attempting to import as plugin.", "no operator TensorScatter"),
    ("ITopKLayer y0: K exceeds the maximum value of 3840", "at most 3840"),
    ("Network has dynamic or shape inputs, but no optimization profile has been defined.", "variable size"),
    ("CHECK(x) failed. Attention operation was not supported by a dedicated kernel.", "no attention kernel"),
    ("an illegal memory access was encountered", "CUDA error 700"),
    ("an engine with host code needs IRuntime::setEngineHostCodeAllowed", "without --version-compatible"),
    ("The model uses opset 24, unsupported", "opset 24"),
    ("Could not find any implementation for node a.\nSome tactics do not have sufficient workspace memory", "larger"),
    ("pybind11::init(): factory function returned nullptr", "could not start"),
]


@pytest.mark.parametrize(("said", "meant"), SEEN, ids=[meant for _, meant in SEEN])
def test_a_known_failure_is_a_sentence(said, meant):
    sentence = explain(f"[TRT] [E] {said}\nand more")
    assert sentence is not None and meant in sentence
    assert "{" not in sentence.replace("{ForeignNode[a...b]}", "")
    assert not sentence.endswith(".") and "\n" not in sentence
    assert explain(RuntimeError(said)) is not None


def test_every_known_failure_is_among_those_tried():
    untried = [
        pattern for pattern, _ in _FAULTS if not any(re.search(pattern, said, re.DOTALL) for said, _ in SEEN)
    ]
    assert untried == []


def test_the_cause_is_told_before_its_consequence():
    last = "Could not find any implementation for node a."
    limited = "Some tactics do not have sufficient workspace memory"
    assert explain(f"{last}\n(cudaErrorMemoryAllocation)\n{limited}").startswith("memory ran out")
    for lines in (f"{limited}\n{last}", f"{last}\n{limited}"):
        assert "larger --workspace" in explain(lines)
    assert explain(limited) is None  # a note that many good builds print


def test_what_is_not_known_is_left_alone():
    assert explain("a wholly new failure") is None
    assert explain("Using 350 MiB, 1350 layers") is None
