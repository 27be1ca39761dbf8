"""ExecuTorch programs give the graph's embeddings, all of it by XNNPACK."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.support.bundle_factory import DIM, network, replace_file

pytest.importorskip("executorch")
from pkd.export.checks.parity import synthetic_crops
from pkd.export.cli import main
from pkd.export.formats.executorch import to_executorch
from pkd.export.graph.build import serialise, uint8_graph
from pkd.serving.inference.registry import Loaded
from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.cli.verification import verify
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import BundleError, InputError, TargetUnavailable
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import open_bundle
from pkd.toolkit.encoders.executorch import open_executorch
from pkd.toolkit.encoders.registry import open_target
from tests.support.every_operator import every_operator

pytestmark = pytest.mark.slow  # to lower two graphs takes half a minute
CROPS = synthetic_crops(8, 112)
INT8 = ["--format", "executorch", "--precision", "int8"]


@contextmanager
def said_on_stderr(path: Path) -> Iterator[None]:
    """Into a file, what libraries in C++ write included."""
    before = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Make a network with every operator and channels in the other order: int8 on export, fp32 added to the bundle."""
    folder = tmp_path_factory.mktemp("executorch")
    onnx.save(every_operator(), str(folder / "t.onnx"))
    (folder / "faces").mkdir()
    for i, crop in enumerate(synthetic_crops(40, 112)):
        cv2.imwrite(str(folder / f"faces/{i:02}.png"), crop[..., ::-1])
    teacher = ["--teacher", str(folder / "t.onnx"), "--teacher-preprocess", "channels=bgr,mean=127.5,std=128"]
    calibration = ["--calib", str(folder / "faces"), "--calib-method", "minmax"]
    with said_on_stderr(folder / "said"):
        assert main([*teacher, "-o", str(folder / "made"), *INT8, *calibration, "--json"]) == 0
        assert main(["--from-bundle", str(folder / "made"), "--format", "executorch", "--json"]) == 0
    assert (folder / "said").read_text() == ""  # the first use in this process: ExecuTorch would tell of its processor
    return Bundle.open(folder / "made")


def test_both_precisions_compute_the_encoder(made: Bundle) -> None:
    expected = open_bundle(made).embed(CROPS)
    fp32, int8 = (open_target(made, f"executorch-{precision}") for precision in ("fp32", "int8"))
    np.testing.assert_allclose(fp32.embed(CROPS), expected, atol=2e-6)
    cosines = np.sum(int8.embed(CROPS) * expected, axis=1)
    assert 0.99 < cosines.min() < 1 - 1e-6
    assert fp32.info == made.manifest.encoder
    assert int8.info.id != made.manifest.encoder.id
    assert int8.info.numeric_mode.startswith("int8-u8s8-")
    for encoder, name in ((fp32, "executorch-fp32"), (int8, "executorch-int8")):
        target = made.manifest.target(name)
        assert target is not None
        assert self_test(made, encoder.embed, target) <= target.golden_tolerance
        assert target.checked_with.startswith("executorch 1.")
    assert not [check for check in verify(made.path, None).checks if check.result == "failed"]


def test_every_operation_is_xnnpacks(made: Bundle) -> None:
    fp32, int8 = (made.manifest.target(f"executorch-{precision}") for precision in ("fp32", "int8"))
    assert fp32 is not None and int8 is not None
    graph = onnx.load_model_from_string(made.read("encoder.onnx")).graph
    outside = {"Cast", "Identity"}  # there is nothing to compute in them
    assert fp32.settings["xnnpack_operations"] >= sum(node.op_type not in outside for node in graph.node)  # type: ignore[operator]
    assert int8.settings["xnnpack_operations"] > fp32.settings["xnnpack_operations"]  # type: ignore[operator]
    programs = [made.read(str(target.file)) for target in (fp32, int8)]
    assert len(programs[1]) < 0.45 * len(programs[0])
    for program in programs:
        assert b"XnnpackBackend" in program
        assert b"aten::" not in program, "an operator of ExecuTorch's own kernels"
        for path in (b"/tmp", str(Path(__file__).parents[4]).encode(), str(Path.home()).encode(), b".py"):
            assert path not in program


def test_only_crops_and_programs_are_taken(made: Bundle, tmp_path: Path) -> None:
    opened = open_target(made, "executorch-fp32", threads=2)
    assert opened.embed(CROPS[:0]).shape == (0, DIM)
    with pytest.raises(InputError, match="uint8"):
        opened.embed(CROPS[:, :50])
    shutil.copytree(made.path, tmp_path / "copy")
    replace_file(tmp_path / "copy", "targets/executorch-fp32/encoder.pte", b"nothing")
    with pytest.raises(BundleError, match=r"executorch 1\.\S+ cannot read the program"):
        open_target(Bundle.open(tmp_path / "copy"), "executorch-fp32")


def test_a_program_of_another_encoder_is_refused(made: Bundle) -> None:
    target = made.manifest.target("executorch-fp32")
    assert target is not None and target.file is not None
    other = describe("t", "teacher", "0" * 64, target.encoder.preprocess, DIM + 1)
    with pytest.raises(BundleError, match=rf"gives .*\(1, {DIM}\)\), expected .*\(1, {DIM + 1}\)"):
        open_executorch(made, target.model_copy(update={"encoder": other}), target.file, 1)


def test_encoders_are_shared_between_threads(made: Bundle) -> None:
    encoders = [open_target(made, f"executorch-{precision}") for precision in ("fp32", "int8")]
    alone = [[encoder.embed(crop[None]) for crop in CROPS] for encoder in encoders]
    with ThreadPoolExecutor(4) as pool:
        for encoder, expected in zip(encoders, alone, strict=True):
            for row, own in zip(pool.map(lambda crop, e=encoder: e.embed(crop[None]), CROPS), expected, strict=True):
                np.testing.assert_array_equal(row, own)


def test_what_xnnpack_lacks_is_refused_by_name() -> None:
    graph = network()
    slope = next(t for t in graph.graph.initializer if t.name == "slope")
    slope.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(slope).reshape(-1), "slope"))
    graph.graph.node.insert(1, helper.make_node("Sqrt", ["slope"], ["computed"]))
    graph.graph.node[2].input[1] = "computed"
    with pytest.raises(InputError, match=r"XNNPACK has no .*where.*, which this network needs"):
        to_executorch(serialise(uint8_graph(graph, Preprocess(), DIM)))


def test_no_server_loads_what_needs_torch(made: Bundle) -> None:
    with pytest.raises(TargetUnavailable, match="for devices"):
        Loaded.open(made.path / "targets/executorch-fp32")
