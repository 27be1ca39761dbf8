"""A target of a bundle opens in its runtime."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pkd.export.checks.parity import synthetic_crops
from pkd.export.formats.openvino import to_ir
from pkd.export.graph.build import serialise, uint8_graph
from pkd.toolkit.bundle.bundle import Bundle, self_test, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.encoder_info import in_mode
from pkd.toolkit.core.errors import BadVector, BundleError, InputError, TargetUnavailable
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.base import NetEncoder, open_bundle
from pkd.toolkit.encoders.openvino import OpenVinoModel
from pkd.toolkit.encoders.registry import open_target, target_of
from tests.support.bundle_factory import DIM, content, network

CROPS = synthetic_crops(5, 112)


def with_targets(folder: Path) -> Bundle:
    """Write a bundle with OpenVINO in fp32 and bf16, a graph for onnxruntime of another scale, an unbuilt engine."""
    files, manifest = content()
    xml, weights, version = to_ir(files["encoder.onnx"])
    made = {"checked_with": "x", "made_with": f"openvino {version}", "graph": "encoder.onnx"}
    info = manifest.encoder
    targets = [
        Target(
            runtime="openvino",
            precision=p,
            encoder=in_mode(info, p),
            golden_tolerance=tolerance,
            file=f"targets/openvino-{p}/encoder.xml",
            **made,  # type: ignore[arg-type]
        )
        for p, tolerance in (("fp32", 1e-5), ("bf16", 1e-3))
    ]
    own = in_mode(info, "int8-x")
    targets += [
        Target(
            runtime="onnxruntime",
            precision="int8",
            encoder=own,
            golden_tolerance=1.0,
            file="targets/o/e.onnx",
            **made,  # type: ignore[arg-type]
        ),
        Target(runtime="tensorrt", precision="fp32", encoder=info, golden_tolerance=1e-5, file=None, **made),  # type: ignore[arg-type]
        Target(runtime="future", precision="fp32", encoder=info, golden_tolerance=1e-5, file="encoder.onnx", **made),  # type: ignore[arg-type]
    ]
    more = {
        f"targets/openvino-{p}/encoder.{e}": d for p in ("fp32", "bf16") for e, d in (("xml", xml), ("bin", weights))
    }
    more["targets/o/e.onnx"] = serialise(uint8_graph(network(), Preprocess(mean=110), DIM))
    return write_bundle(folder / "b", {**files, **more}, manifest.model_copy(update={"targets": tuple(targets)}))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("openvino")
    return with_targets(tmp_path_factory.mktemp("targets"))


def test_openvino_computes_the_encoder_and_keeps_its_id(bundle: Bundle) -> None:
    opened, reference = open_target(bundle, "openvino-fp32"), open_bundle(bundle)
    assert opened.info == reference.info
    np.testing.assert_allclose(opened.embed(CROPS), reference.embed(CROPS), atol=1e-6)
    assert opened.embed(CROPS[:0]).shape == (0, DIM)
    assert self_test(bundle, opened.embed, bundle.manifest.target("openvino-fp32")) < 1e-6
    with pytest.raises(InputError, match="uint8"):
        opened.embed(CROPS.astype(np.float32))  # type: ignore[arg-type]


def test_openvino_in_every_batch_size_and_from_several_threads(bundle: Bundle) -> None:
    opened = open_target(bundle, "openvino-fp32")
    crops = np.concatenate([CROPS, CROPS[::-1]])
    expected = open_bundle(bundle).embed(crops)
    sizes = [*range(1, len(crops) + 1), *range(len(crops), 0, -1)]  # more than have a model of their own
    with ThreadPoolExecutor(4) as pool:
        for size, rows in zip(sizes, pool.map(lambda size: opened.embed(crops[:size]), sizes), strict=True):
            np.testing.assert_allclose(rows, expected[:size], atol=1e-6)


def test_bf16_is_another_encoder_with_other_numbers(bundle: Bundle) -> None:
    try:
        opened = open_target(bundle, "openvino-bf16")
    except TargetUnavailable as error:
        pytest.skip(f"this processor has no bf16: {error}")
    assert (opened.info.numeric_mode, opened.info.space) == ("bf16", bundle.manifest.encoder.space)
    assert opened.info.id != bundle.manifest.encoder.id
    difference = np.abs(opened.embed(CROPS) - open_bundle(bundle).embed(CROPS)).max()
    assert 1e-5 < difference < 2e-2, "pinned: fp32 would be closer"


def test_a_precision_that_the_processor_lacks_is_not_silently_another(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkd.toolkit.encoders import openvino

    xml, weights = (bundle.read(f"targets/openvino-fp32/encoder.{end}") for end in ("xml", "bin"))
    monkeypatch.setitem(openvino.HINTS, "fp16", "f16")  # no x86 processor of ours computes in it
    with pytest.raises(TargetUnavailable, match="not in f16"):
        OpenVinoModel(xml, weights, "fp16", 1)


def test_a_spelling_for_every_command(bundle: Bundle) -> None:
    opened = open_encoder(str(bundle.path / "targets/openvino-fp32"))
    assert isinstance(opened, NetEncoder)
    int8 = open_encoder(str(bundle.path / "targets/onnxruntime-int8"))
    assert int8.info.numeric_mode == "int8-x"
    assert not np.allclose(int8.embed(CROPS), open_bundle(bundle).embed(CROPS), atol=1e-3)
    assert target_of(bundle.path) is None
    assert target_of(bundle.path / "targets") is None


def test_what_cannot_be_opened_says_why(bundle: Bundle) -> None:
    for name, kind, said in [
        ("openvino-int8", BundleError, "no target openvino-int8; it has openvino-fp32, "),
        ("tensorrt-fp32", TargetUnavailable, "not built yet, only its graph encoder.onnx"),
        ("future-fp32", TargetUnavailable, "knows onnxruntime, openvino"),
    ]:
        with pytest.raises(kind, match=said):
            open_target(bundle, name)


def test_the_self_test_of_a_target_uses_its_own_tolerance(bundle: Bundle) -> None:
    other = open_target(bundle, "onnxruntime-int8").embed
    assert self_test(bundle, other, bundle.manifest.target("onnxruntime-int8")) > 1e-3
    with pytest.raises(BundleError, match="openvino-bf16: golden crops come out"):
        self_test(bundle, other, bundle.manifest.target("openvino-bf16"))
    with pytest.raises(BundleError, match="allowed 1e-05"):
        self_test(bundle, other)


def test_zero_rows_are_refused_by_openvino_too() -> None:
    pytest.importorskip("openvino")
    from onnx import numpy_helper

    zero = network()
    matrix = next(t for t in zero.graph.initializer if t.name == "matrix")
    matrix.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(matrix)), "matrix"))
    xml, weights, _ = to_ir(serialise(uint8_graph(zero, Preprocess(), DIM)))
    encoder = NetEncoder(content()[1].encoder, OpenVinoModel(xml, weights, "fp32", 1))
    with pytest.raises(BadVector):
        encoder.embed(CROPS)


def test_no_path_of_this_machine_is_in_the_ir(bundle: Bundle) -> None:
    for name in bundle.manifest.files:
        if name.endswith(".xml"):
            assert str(Path.home()).encode() not in bundle.read(name)
            assert b"/tmp" not in bundle.read(name)


def test_what_openvino_cannot_convert_is_refused() -> None:
    pytest.importorskip("openvino")
    with pytest.raises(InputError, match="cannot convert"):
        to_ir(b"nothing")
