"""Core ML programs: each operator is the graph's, weights are its bits, and no certificate is claimed for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from pkd.export.checks.parity import synthetic_crops
from pkd.export.cli import main
from pkd.export.formats.coreml import MODEL, PACKAGE, WEIGHTS, fixed, quiet, to_coreml
from pkd.export.formats.coreml_check import Program, Step, compare
from pkd.export.graph.build import serialise, torch_network, uint8_graph
from pkd.export.graph.fp16 import to_half
from pkd.export.quantization.quantize import embeddings
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.cli import verify
from pkd.toolkit.cli.verification import verify as verified
from pkd.toolkit.core.errors import InputError, PkdError, TargetUnavailable
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.registry import open_target
from tests.support.bundle_factory import DIM, teacher_file
from tests.support.extras import need

need("torch", "coremltools", reason="pip install 'pkd[coreml]'")
CROPS = synthetic_crops(3, 112)


def read(graph: onnx.ModelProto) -> tuple[Program, onnx.ModelProto]:
    """Convert a graph and read its program back from the files."""
    files = to_coreml(serialise(graph))
    with quiet():
        program = Program.read(files[f"{PACKAGE}/Data/{MODEL}"], files[f"{PACKAGE}/Data/{WEIGHTS}"])
    return program, fixed(serialise(graph))


@pytest.fixture(scope="module")
def every() -> tuple[Program, onnx.ModelProto]:
    from tests.support.every_operator import every_operator

    return read(uint8_graph(every_operator(), Preprocess(), DIM))


def test_operators_and_weights_are_the_graphs(every: tuple[Program, onnx.ModelProto]) -> None:
    program, graph = every
    found = compare(program, graph)
    weights = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    numbers = sum(int(np.prod(t.dims)) for t in weights if np.prod(t.dims) > 1)
    assert found["weights_equal_bit_by_bit"] == numbers
    assert found["operators_compared"] == len([n for n in graph.graph.node if n.op_type not in ("Identity", "Cast")])
    assert float(found["largest_difference"]) < 2e-5
    np.testing.assert_allclose(program(CROPS), embeddings(graph_of_any_batch(graph), CROPS), atol=2e-6)


def graph_of_any_batch(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Free the batch again, which ``fixed`` states."""
    made = onnx.ModelProto.FromString(graph.SerializeToString())
    del made.graph.value_info[:]
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return made


def test_float16_is_the_graphs_own_rounding() -> None:
    from tests.support.every_operator import every_operator

    plain = uint8_graph(every_operator(), Preprocess(), DIM)
    program, graph = read(to_half(plain))
    assert float(compare(program, graph)["largest_difference"]) < 4e-3
    kinds = {step.dtype.name for step in program.steps}
    assert kinds == {"float16", "float32"}
    (conv,) = [step.inputs["weight"] for step in program.steps if step.name == first_conv(graph)]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in plain.graph.initializer}
    name = next(node for node in plain.graph.node if node.op_type == "Conv").input[1]
    assert conv.dtype == np.float16 and conv.tobytes() == stored[name].astype(np.float16).tobytes()
    np.testing.assert_allclose(program(CROPS), embeddings(plain, CROPS), atol=5e-3)


def first_conv(graph: onnx.ModelProto) -> str:
    return f"n{next(i for i, node in enumerate(graph.graph.node) if node.op_type == 'Conv')}"


def test_other_operators_paddings_and_scalings() -> None:
    from tests.support.every_operator import other_layers

    scaled = Preprocess(channels="bgr", mean=(91.5, 103.9, 131.1), std=(57, 58, 59))
    plain = uint8_graph(torch_network(other_layers(DIM, padded_pools=True), 112), scaled, DIM)
    program, graph = read(plain)
    compare(program, graph)
    np.testing.assert_allclose(program(CROPS), embeddings(plain, CROPS), atol=2e-6)


def changed(program: Program, kind: str, **inputs: object) -> Program:
    """Return the program with other inputs of its first operator of a kind."""
    at = next(i for i, step in enumerate(program.steps) if step.kind == kind)
    step = program.steps[at]
    other = replace(step, inputs={**step.inputs, **inputs})
    return replace(program, steps=(*program.steps[:at], other, *program.steps[at + 1 :]))


def test_every_fault_of_a_program_is_named(every: tuple[Program, onnx.ModelProto]) -> None:
    program, graph = every
    first = next(step for step in program.steps if step.kind == "conv")
    weight = first.inputs["weight"].copy()
    weight.view(np.uint32)[0, 0, 0, 0] ^= 1
    padded = next(step for step in program.steps if step.kind == "conv" and step.inputs["pad"].any())
    extra = Step("relu", "n999", {"x": program.steps[0].inputs["x"]}, "more", (1,), np.dtype(np.float32))
    slopes = next(step for step in program.steps if step.kind == "prelu")
    doubled = next(step for step in program.steps if step.kind == "relu")

    def swapped(old: Step, new: Step) -> Program:
        return replace(program, steps=tuple(new if step is old else step for step in program.steps))

    faults = [
        (changed(program, "conv", weight=weight), "Conv .* weights in the program that are not the graph's"),
        (changed(program, "conv", weight=weight.astype(np.float16)), "weights in the program that are not the graph's"),
        (
            changed(program, "conv", strides=np.array([4, 4], np.int32)),
            r"Conv .* gives \(1, 8, 27, 27\) by its settings",
        ),
        (swapped(padded, replace(padded, inputs={**padded.inputs, "pad": np.array([0, 2, 0, 2])})), "Conv .* away"),
        (swapped(slopes, replace(slopes, kind="relu")), "PRelu .* is relu in the program"),
        (swapped(doubled, replace(doubled, name="elsewhere")), "Relu .* is not there in the program"),
        (swapped(doubled, replace(doubled, shape=(1, 8, 14, 13))), r"Relu .* has float32 \(1, 8, 14, 13\)"),
        (changed(program, "relu", x=program.steps[1].inputs["x"]), "Relu .* reads"),
        (replace(program, steps=(*program.steps, extra)), "were asked for"),
    ]
    for wrong, message in faults:
        with pytest.raises(PkdError, match=message):
            compare(wrong, graph)


def test_a_target_claims_no_certificate_and_a_kit_proves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher_file(tmp_path / "t.onnx")
    stated = ["--teacher", "t.onnx", "--teacher-preprocess", "channels=rgb,mean=127.5,std=127.5", "--format", "coreml"]
    assert main([*stated, "-o", "made", "--json"]) == 0
    said = capsys.readouterr()
    bundle = Bundle.open("made")
    (target,) = bundle.manifest.targets
    assert target.package == "targets/coreml-fp32/encoder.mlpackage/"
    assert sorted(name for name in bundle.manifest.files if name.startswith(target.package)) == [
        f"{target.package}Data/{MODEL}",
        f"{target.package}Data/{WEIGHTS}",
        f"{target.package}Manifest.json",
    ]
    size = sum(len(bundle.read(name)) for name in bundle.manifest.files if name.startswith(target.package))
    (shown,) = json.loads(said.out)["targets"]
    assert shown["bytes"] == size and json.loads(said.out)["uncertified"] == ["coreml-fp32"]
    assert target.encoder.id != bundle.manifest.encoder.id and target.encoder.numeric_mode == "fp32-coreml"
    assert "Apple's systems only" in str(target.settings["not_measured"]) and "no Core ML" in target.checked_with

    assert main([*stated, "-o", "again"]) == 0  # the same bytes
    assert Bundle.open("again").manifest.files == bundle.manifest.files

    with pytest.raises(TargetUnavailable, match=r"on Apple's systems only.*--device-kit kit"):
        open_target(bundle, "coreml-fp32")
    assert [c.result for c in verified(Path("made"), None).checks if c.file == "targets/coreml-fp32"] == ["not checked"]
    assert verify.main(["made/targets/coreml-fp32", "--device-kit", "kit"]) == 0
    assert json.loads(Path("kit/kit.json").read_text())["encoder"] == target.encoder.id


def test_what_is_not_translated_is_named() -> None:
    from tests.support.every_operator import unknown_operator

    with pytest.raises(InputError, match=r"Core ML: Celu \(net/bell\) is not translated\. Leave --format coreml out"):
        to_coreml(serialise(uint8_graph(unknown_operator("Celu"), Preprocess(), DIM)))
