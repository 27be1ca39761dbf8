"""Models for ncnn give the graph's embeddings."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from pkd.export.checks.parity import synthetic_crops
from pkd.export.formats.ncnn import to_ncnn
from pkd.export.graph.build import serialise, torch_network, uint8_graph
from pkd.export.quantization.quantize import embeddings
from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.ncnn import NcnnNet
from pkd.toolkit.encoders.registry import open_target
from tests.support.bundle_factory import DIM, content, network

pytest.importorskip("ncnn")
pytest.importorskip("pnnx", exc_type=ImportError)
CROPS = synthetic_crops(3, 112)


def same(graph: onnx.ModelProto) -> None:
    param, weights, version = to_ncnn(serialise(graph))
    assert version.isdecimal()
    np.testing.assert_allclose(NcnnNet(param, weights, 1)(CROPS), embeddings(graph, CROPS), atol=2e-6)


@pytest.mark.parametrize("preprocess", [Preprocess(), Preprocess(mean=0, std=255)], ids=str)
def test_a_network_with_prelu_and_any_preprocessing(preprocess: Preprocess) -> None:
    same(uint8_graph(network(), preprocess, DIM))


@pytest.mark.parametrize("spec", ["mobilefacenet-relu:0.25", "repvit:0.25"])
def test_backbones(spec: str) -> None:
    torch = pytest.importorskip("torch")
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    same(uint8_graph(torch_network(build(spec, DIM).eval(), 112), Preprocess(), DIM))


def test_a_bundle_runs_in_ncnn_after_what_it_was_read_from_is_gone(tmp_path: Path) -> None:
    files, manifest = content()
    param, weights, version = to_ncnn(files["encoder.onnx"])
    target = Target(
        runtime="ncnn",
        precision="fp32",
        encoder=manifest.encoder,
        graph="encoder.onnx",
        file="targets/ncnn-fp32/encoder.param",
        golden_tolerance=1e-5,
        checked_with="x",
        made_with=version,
    )
    more = {"targets/ncnn-fp32/encoder.param": param, "targets/ncnn-fp32/encoder.bin": weights}
    write_bundle(tmp_path / "b", {**files, **more}, manifest.model_copy(update={"targets": (target,)}))
    opened = open_target(Bundle.open(tmp_path / "b"), "ncnn-fp32")
    gc.collect()
    golden = Bundle.open(tmp_path / "b").golden()
    np.testing.assert_allclose(opened.embed(golden.crops), golden.embeddings, atol=1e-6)
    assert opened.embed(CROPS[:0]).shape == (0, DIM)
    assert opened.info == manifest.encoder
    with pytest.raises(InputError, match="uint8"):
        opened.embed(CROPS[:, :50])


def test_what_ncnn_lacks_is_refused_by_name() -> None:
    made = network()
    made.graph.node[-1].output[0] = "row"
    made.graph.node.append(helper.make_node("CumSum", ["row", "axis"], ["embedding"]))
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "axis"))
    with pytest.raises(InputError, match=r"ncnn has no \S+, which this network needs"):
        to_ncnn(serialise(uint8_graph(made, Preprocess(), DIM)))


def test_no_path_of_this_machine_is_in_the_network() -> None:
    param, _, _ = to_ncnn(content()[0]["encoder.onnx"])
    assert b"/" not in param
