"""Known failures of TensorRT and CUDA, each as one sentence: what is wrong, and what to do."""

from __future__ import annotations

import re

# The first pattern that is found wins, so the cause stands before its consequences: a builder that ran out of memory
# ends with "could not find any implementation". {1} is the pattern's first group.
_FAULTS: tuple[tuple[str, str], ...] = (
    # ---- the installation ------------------------------------------------------------------------------------------
    (
        r"(lib(?:nvinfer|nvonnxparser|tensorrt)[\w.]*): cannot open shared object|Could not find: (lib[\w.]+\w)",
        "TensorRT is only half installed, its library {1} is not found: install all of TensorRT (`apt install "
        "tensorrt`, or pip with NVIDIA's index), or put the library's folder into LD_LIBRARY_PATH",
    ),
    (
        r"Unable to load library: (\S*nvinfer_builder_resource[\w.]*)",
        "TensorRT is only half installed, the builder's library {1} is not found: install TensorRT's full package; the "
        "lean and dispatch packages cannot build",
    ),
    (
        r"(lib(?:cudart|cublas|cudnn|nvrtc)[\w.]*): cannot open shared object",
        "the CUDA library {1} that TensorRT needs is not found: install the CUDA release that it was made "
        "for",
    ),
    (
        r"libcuda\.so[\w.]*: cannot open shared object|CUDA driver (?:library|not found)",
        "there is no NVIDIA driver on this machine: install it, or run where there is a GPU (in a container, with "
        "`--gpus all` or `--runtime nvidia`)",
    ),
    # ---- the driver and the device -----------------------------------------------------------------------------------
    (
        r"cudaError 35\b|error:? 35\b|CUDA driver version is insufficient|cudaErrorInsufficientDriver",
        "CUDA finds no driver that fits (CUDA error 35): there is no GPU here, or its driver is older than this CUDA "
        "needs; check `nvidia-smi` and update the driver, or, in a container, start it with the GPU",
    ),
    (
        r"cudaError 100\b|error:? 100\b|no CUDA-capable device|cudaErrorNoDevice",
        "CUDA finds no GPU (CUDA error 100): check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or start the container with "
        "the GPU",
    ),
    (
        r"cudaError 80[34]\b|error:? 80[34]\b|unsupported display driver|cudaErrorSystemDriverMismatch",
        "the NVIDIA driver's parts do not fit each other (CUDA error 803): reboot after a driver update",
    ),
    (
        r"cudaError 46\b|error:? 46\b|cudaErrorDevicesUnavailable|busy or unavailable",
        "the GPU is busy or in exclusive use by another process (CUDA error 46): end that process",
    ),
    (
        r"cudaError 209\b|error:? 209\b|no kernel image is available|cudaErrorNoKernelImageForDevice",
        "this TensorRT has no kernels for this GPU (CUDA error 209): install a TensorRT release that supports the GPU",
    ),
    # ---- engines that do not fit -------------------------------------------------------------------------------------
    (
        r"expecting compute (\d[\d.]*\d) got compute (\d[\d.]*\d)",
        "the engine was built for another GPU (compute capability {2}, this one is {1}): run `svdprune build` on this "
        "machine",
    ),
    (
        r"expecting library version (\d[\w.]*\w) got (\d[\w.]*\w)",
        "the engine was built by another TensorRT ({2}, this one is {1}): run `svdprune build` again",
    ),
    (
        r"Version tag does not match.*?Current Version: (\d+), Serialized Engine Version: (\d+)",
        "the engine was built by another TensorRT (serialisation version {2}, this one reads {1}): run `svdprune "
        "build` again",
    ),
    (
        r"host code|HostCodeAllowed",
        "the engine is version-compatible and holds code of its own TensorRT, which was not allowed to run: open it "
        "through svdprune, or build it without --version-compatible",
    ),
    (
        r"Size specified in header does not match archive size|sizeRead ==|Mismatch between allocated memory size",
        "the engine is truncated or was changed: run `svdprune build` again",
    ),
    (
        r"[Mm]agic tag|does not conform to the expected format for TensorRT-RTX",
        "the file is not an engine of this kind of TensorRT (TensorRT and TensorRT-RTX do not read each other's), or "
        "it is damaged: run `svdprune build` again",
    ),
    # ---- memory ------------------------------------------------------------------------------------------------------
    (
        r"within workspace limit|due to insufficient workspace",
        "an operation of the graph needs more than the workspace limit: give a larger --workspace, or none",
    ),
    (
        r"OutOfMemory \(Requested size was (\d+) bytes",
        "an operation asked for {1} bytes and did not get them: give a larger --workspace if there is a limit, else "
        "close other programs or add memory",
    ),
    (
        r"out of memory|OutOfMemory|cudaErrorMemoryAllocation|could not be allocated|bad_alloc|insufficient memory",
        "memory ran out: close other programs (a desktop takes about 1 GB), add swap, give --workspace a smaller "
        "limit, build one part at a time (--part vision), or export with fewer tokens or a smaller model",
    ),
    (
        r"Could not find any implementation.*sufficient workspace memory|"
        r"sufficient workspace memory.*Could not find any implementation",
        "an operation of the graph needs more than the workspace limit: give a larger --workspace, or none",
    ),
    (
        r"Could not find any implementation for node ([^\s,()]+)",
        "TensorRT found no implementation for {1}; with little memory that is how it reports a lack of it: close other "
        "programs, add swap, give --workspace; if memory is plenty, the operator is not supported in this precision",
    ),
    # ---- graphs that do not fit --------------------------------------------------------------------------------------
    (
        r"UInt8 but must have type",
        "the vision graph hands uint8 to an operator that TensorRT takes floats in: export the bundle again with this "
        "svdprune",
    ),
    (
        r"No importer registered for op: (\w+)",
        "this TensorRT has no operator {1}: export the bundle for a target with this TensorRT (--target), so that the "
        "export avoids it",
    ),
    (
        r"uses opset (\d+)|[Uu]nsupported (?:ONNX )?opset(?: version)?:? (\d+)",
        "this TensorRT does not read graphs of opset {1}: export the bundle for a target with this TensorRT",
    ),
    (
        r"K exceeds the maximum",
        "TensorRT's TopK takes at most 3840: export with fewer tokens (--keep), or with all (--select none)",
    ),
    (
        r"Attention operation was not supported by a dedicated kernel",
        "TensorRT has no attention kernel for the decoder's sizes and precision: build the vision engine alone (--part "
        "vision), which is chained to the ONNX Runtime decoder",
    ),
    (
        r"no optimization profile has been defined",
        "the graph has an input of variable size that the build gave no sizes for: export the bundle again with this "
        "svdprune",
    ),
    # ---- at run time -------------------------------------------------------------------------------------------------
    (
        r"cudaError 700\b|error:? 700\b|illegal memory access",
        "a kernel read outside its memory (CUDA error 700): build the engine again; if it stays, report it with the "
        "TensorRT version",
    ),
    (
        r"factory function returned nullptr",
        "TensorRT could not start: there is no GPU that it can use here, or the driver does not fit; check "
        "`nvidia-smi`",
    ),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern, re.DOTALL), sentence) for pattern, sentence in _FAULTS)


def explain(text: str | BaseException) -> str | None:
    """What a message of TensorRT or CUDA means, as a clause without a final stop; None when it is not a known one.

    Args:
        text: an error, a log line, or several lines; where several faults are named, the cause is told.
    """
    words = str(text)
    for pattern, sentence in _COMPILED:
        match = pattern.search(words)
        if match:
            groups = [group for group in match.groups() if group is not None]
            for number, group in enumerate(groups, 1):
                sentence = sentence.replace(f"{{{number}}}", group)
            return sentence
    return None
