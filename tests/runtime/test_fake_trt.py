"""The fake TensorRT modules: a name that a version lacks is an error, and what they do has the real signatures."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import tiny
from fake_trt import FULL, VERSIONS, install, make_trt, run_onnx
from fake_trt_behaviour import CLASSES
from fake_trt_common import engine_content


def build(trt, path, batch=4):
    logger = trt.Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    side = tiny.SIDE
    profile.set_shape("pixels", (1, side, side, 3), (1, side, side, 3), (batch, side, side, 3))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.fixture
def graph(tmp_path):
    tiny.vision_graph(tmp_path / "vision.onnx")
    return tmp_path / "vision.onnx"


def test_a_removed_name_is_an_attribute_error():
    old, new = make_trt("tensorrt-10.3"), make_trt("tensorrt-11.4")
    assert old.BuilderFlag.FP16 is not None
    for use in (
        lambda trt: trt.BuilderFlag.FP16,
        lambda trt: trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH,
        lambda trt: trt.OnnxParser.supports_model,
        lambda trt: setattr(trt.IBuilderConfig(), "int8_calibrator", None),
        lambda trt: trt.IBuilderConfig().algorithm_selector,
    ):
        use(old)
        with pytest.raises(AttributeError):
            use(new)
    with pytest.raises(AttributeError):
        new.Builder(new.Logger()).max_workspace_size = 1  # gone long before


def test_a_name_without_a_behaviour_says_so():
    trt = make_trt("tensorrt-10.3")
    with pytest.raises(AssertionError, match=r"no behaviour for Builder\.reset"):
        trt.Builder(trt.Logger()).reset()


@pytest.mark.parametrize("api", VERSIONS)
def test_an_engine_is_built_and_run(api, graph):
    trt = make_trt(api)
    data = build(trt, graph)
    assert engine_content(data)["typed"] and engine_content(data)["version"] == VERSIONS[api]
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(data)
    context = engine.create_execution_context()
    side = tiny.SIDE
    assert not context.set_input_shape("pixels", (5, side, side, 3)) and context.infer_shapes() == ["pixels"]
    assert context.set_input_shape("pixels", (2, side, side, 3)) and not context.infer_shapes()
    assert context.get_tensor_shape("features") == (2, tiny.KEEP, tiny.HIDDEN)
    memory = {1: np.zeros((2, side, side, 3), np.uint8)}
    for address, index in enumerate(range(engine.num_io_tensors), 1):
        assert context.set_tensor_address(engine.get_tensor_name(index), address)

    def execute(call):
        given = {name: memory[address] for name, (address, _, _) in call.inputs.items()}
        made = run_onnx(call.model, given)
        memory.update({address: made[name] for name, (address, _, _) in call.outputs.items()})
        return True

    trt.fake.execute = execute
    assert context.execute_async_v3(7)
    assert memory[2].shape == (2, tiny.KEEP, tiny.HIDDEN) and trt.fake.called("execute_async_v3") == [(7,)]


def test_what_an_engine_refuses(graph):
    trt = make_trt("tensorrt-10.3", sm=87)
    data = build(trt, graph)
    for other, broken, words in (
        (trt, data[:-5], "does not match archive size"),
        (trt, b"", "Magic tag"),
        (make_trt("tensorrt-10.16", sm=87), data, "expecting library version 10.16.1.11 got 10.3.0"),
        (make_trt("tensorrt-10.3", sm=89), data, "expecting compute 8.9 got compute 8.7"),
        (make_trt("tensorrt_rtx-1.7", sm=87), data, "Magic tag"),
    ):
        said = []

        class Log(other.ILogger):
            def log(self, severity, msg, said=said):
                said.append(msg)

        assert other.Runtime(Log()).deserialize_cuda_engine(broken) is None
        assert words in said[-1]


@pytest.mark.parametrize("api", FULL)
def test_full_tensorrt_makes_no_builder_without_a_gpu(api):
    trt = make_trt(api, sm=None)
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        trt.Builder(trt.Logger())


def test_install(monkeypatch):
    trt = install(monkeypatch, make_trt("tensorrt-10.16"))
    import tensorrt

    assert tensorrt is trt and tensorrt.__version__ == "10.16.1.11"


def test_the_behaviours_have_the_real_signatures():
    """Names of parameters, against the docstrings of the one binding that installs everywhere."""
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    compared = 0
    for name, kind in CLASSES.items():
        for member, value in vars(kind).items():
            theirs = getattr(getattr(real, name, None), member, None)
            says = getattr(theirs, "__doc__", None) or ""
            head = re.findall(rf"(?:^|\n)(?:\d+\. )?{member}\((self[^\n]*)\) ->", says)
            if not inspect.isfunction(value) or not head or member.startswith("_"):
                continue
            ours = [item.name for item in inspect.signature(value).parameters.values()]
            if "_" in ours:
                continue  # takes anything
            found = [re.findall(r"(?:^|, )(\w+): ", line) for line in head]
            assert ours in found, f"{name}.{member}: ours {ours}, the real {found}"
            compared += 1
    assert compared > 25
