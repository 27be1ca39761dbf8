"""Engines are built where TensorRT is there, and described where it is not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from pkd.export.checks.parity import synthetic_crops
from pkd.export.formats.tensorrt import build_engine
from pkd.export.graph.build import float_graph, serialise, torch_network, uint8_graph
from pkd.export.graph.fp16 import to_half
from pkd.export.graph.rewrite import decompose_prelu
from pkd.export.options import BuildOptions, parse_batches
from pkd.export.quantization.quantize import calibrate, quantise
from pkd.toolkit.core.errors import InputError, TargetUnavailable
from pkd.toolkit.core.gpu import find_gpu
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.tensorrt import error_logger, invalidity
from tests.support.bundle_factory import DIM, network

PACKAGES = ("tensorrt_rtx", "tensorrt")
PLAIN = uint8_graph(network(), Preprocess(channels="bgr"), DIM)


def need(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "tensorrt" and find_gpu() is None:
        pytest.skip("tensorrt builds on an NVIDIA GPU only, and none was found")


def int8(form: str) -> onnx.ModelProto:
    ranges = calibrate(PLAIN, synthetic_crops(4, 112), "minmax", lambda done: None)
    return quantise(PLAIN, ranges, form)


FORMS = {
    "fp32": lambda: PLAIN,
    "fp32 decomposed": lambda: decompose_prelu(PLAIN),
    "fp16": lambda: to_half(PLAIN),
    "int8 s8s8": lambda: int8("s8s8"),
    "float input": lambda: float_graph(network(), Preprocess(), DIM),
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_parsed_and_built_with_a_dynamic_batch(package: str, form: str) -> None:
    need(package)
    phases: list[str] = []
    engine = build_engine(
        package, serialise(FORMS[form]()), BuildOptions(batches=(1, 4, 16), workspace=256), phases.append
    )
    assert len(engine.data) > 1000
    assert phases, "the builder reports progress"
    assert engine.settings["tensorrt"] == engine.version
    assert (engine.settings["batch"], engine.settings["workspace_mib"]) == ("1:4:16", 256)
    assert engine.settings["compute_capability"]
    trt = importlib.import_module(package)
    assert invalidity(trt, trt.Runtime(error_logger(trt, [])), engine.data) is None


@pytest.mark.parametrize("spec", ["mobilefacenet:0.25", "iresnet18", "repvit:0.25"])
def test_real_backbones_are_built(spec: str) -> None:
    need("tensorrt_rtx")
    torch = pytest.importorskip("torch")
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    graph = uint8_graph(torch_network(build(spec, DIM).eval(), 112), Preprocess(), DIM)
    for model in (graph, to_half(graph)):
        assert build_engine("tensorrt_rtx", serialise(model), BuildOptions(), lambda phase: None).data


@pytest.mark.parametrize("package", PACKAGES)
def test_what_the_parser_refuses_is_an_error_of_one_line(package: str) -> None:
    need(package)
    unsigned = pytest.raises(InputError, match=f"{package} .* cannot parse the graph: ")
    with unsigned as caught:
        build_engine(package, serialise(int8("u8s8")), BuildOptions(), lambda phase: None)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot parse"):
        build_engine(package, b"nothing", BuildOptions(), lambda phase: None)


def test_an_engine_of_rtx_holds_the_network_and_is_the_same_size_every_time() -> None:
    need("tensorrt_rtx")
    sizes = [len(build_engine("tensorrt_rtx", serialise(PLAIN), BuildOptions(), print).data) for _ in range(2)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    half = build_engine("tensorrt_rtx", serialise(to_half(PLAIN)), BuildOptions(), print)
    weights = sum(len(tensor.raw_data) for tensor in PLAIN.graph.initializer)
    assert sizes[0] > weights
    assert sizes[0] - len(half.data) > 0.25 * weights


def test_without_a_gpu_tensorrt_is_unavailable_and_says_why() -> None:
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(TargetUnavailable, match="no NVIDIA GPU"):
        build_engine("tensorrt", serialise(PLAIN), BuildOptions(), print)


def test_without_the_package_the_extra_is_named(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['tensorrt_rtx'] = None\n"
        "from pkd.export.formats.tensorrt import *\n"
        "try: build_engine('tensorrt_rtx', b'', BuildOptions(), print)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said == "TargetUnavailable tensorrt_rtx is not installed (pip install 'pkd[trt-rtx]')\n"


def test_batches_are_read_or_refused() -> None:
    assert parse_batches("1:8:32") == (1, 8, 32)
    assert parse_batches("4:4:4") == (4, 4, 4)
    for wrong in ("", "8", "1:2", "0:1:2", "2:1:3", "1:2:3:4", "a:b:c", "1:-2:3", "1:8:9999", "1:8:3.5"):
        with pytest.raises(InputError, match="1:8:32"):
            parse_batches(wrong)


@pytest.mark.gpu
def test_a_timing_cache_is_written_and_read(tmp_path: Path) -> None:
    need("tensorrt")
    options = BuildOptions(timing_cache=tmp_path / "cache")
    build_engine("tensorrt", serialise(PLAIN), options, print)
    assert (tmp_path / "cache").stat().st_size > 0
    build_engine("tensorrt", serialise(PLAIN), options, print)
