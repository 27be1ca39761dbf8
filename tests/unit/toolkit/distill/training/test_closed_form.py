"""The closed-form map against ridge regression written out, and its choice of layer and weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("torch")

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.adopted import Adopted, adopt
from pkd.toolkit.distill.training.closed_form import FEWEST_PEOPLE, fit_map, hold_out
from pkd.toolkit.encoders.base import Embeddings, unit_rows
from tests.support.training_data import SIZE, write_patterns

WIDTH, OWN, DIM = 12, 4, 6
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Adopted:
    """Means over 12 parts of the picture, through a bend, and four of them mixed as the embedding."""
    matrix = RANDOM.normal(size=(WIDTH, OWN)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["data"], ["parts"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["parts"], ["flat"]),
        helper.make_node("Relu", ["flat"], ["bent"]),
        helper.make_node("Gemm", ["bent", "w", "b"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", OWN])],
        [numpy_helper.from_array(matrix, "w"), numpy_helper.from_array(np.ones(OWN, np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = tmp_path_factory.mktemp("student") / "m.onnx"
    onnx.save(model, str(path))
    return adopt(str(path), f"mean=0,std=255,size={SIZE},template=none")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> FaceSet:
    return FaceSet.read(write_patterns(tmp_path_factory.mktemp("crops"), identities=40, images=5))


def targets_of(student: Adopted, faces: FaceSet, noise: float, *, wide: bool) -> Embeddings:
    """Compute what a teacher gives that sees the student's features (or its embedding alone), apart from noise."""
    features = student.features.embed(faces.load(range(len(faces)), SIZE)).astype(np.float64)
    if not wide:
        features = features @ student.weight + student.bias
    random = np.random.default_rng(1)
    rows = features @ random.normal(size=(features.shape[1], DIM))
    return unit_rows((rows + noise * random.normal(size=rows.shape)).astype(np.float32))


def fit(student: Adopted, faces: FaceSet, targets: Embeddings, cache: Path, **more: Any) -> Any:
    options = {"measure": lambda *rows: {"rows": len(rows[0])}, "refit": True, **more}
    return fit_map(student, targets, faces, cache=cache, **options)


def mapped(student: Adopted, faces: FaceSet, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> Embeddings:
    features = student.features.embed(faces.load(range(len(faces)), SIZE))
    return unit_rows((features @ weight + bias).astype(np.float32))


def test_the_network_computes_the_map_and_equals_ridge_written_out(
    student: Adopted, faces: FaceSet, tmp_path: Path
) -> None:
    import torch

    targets = targets_of(student, faces, 0.05, wide=True)
    found = fit(student, faces, targets, tmp_path)
    assert found.report["layer"] == "layer in front of the embedding"
    assert found.report["kind"] == "ridge"
    crops = faces.load(range(len(faces)), SIZE)
    f = student.features.embed(crops).astype(np.float64)
    order = np.random.default_rng(0)
    held, _ = hold_out(faces.labels, order)
    seen = order.permutation(np.setdiff1d(np.arange(len(faces)), held))
    m = np.sqrt(np.mean(np.sum(f[seen] ** 2, axis=1)))
    z = np.concatenate([f, np.full((len(f), 1), m)], axis=1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    n, penalty = len(f), found.report["penalty"]
    weight = np.linalg.solve(z.T @ z / n + penalty * np.eye(WIDTH + 1), z.T @ targets / n)
    rows = mapped(student, faces, found.weight, found.bias)
    np.testing.assert_allclose(unit_rows((z @ weight).astype(np.float32)), rows, atol=1e-4)

    network = student.network(DIM)
    network.set_map(found.weight, found.bias)
    with torch.no_grad():
        rows = unit_rows(network.eval()(torch.from_numpy(student.info.preprocess(crops))).numpy())
    np.testing.assert_allclose(rows, mapped(student, faces, found.weight, found.bias), atol=1e-5)


def test_the_better_layer_is_chosen_on_held_out_people(student: Adopted, faces: FaceSet, tmp_path: Path) -> None:
    for wide, expected in ((True, "layer in front of the embedding"), (False, "embedding")):
        report = fit(student, faces, targets_of(student, faces, 0.3, wide=wide), tmp_path).report
        assert report["layer"] == expected
        assert report["held_out"]["by"] == "people"
        assert report["held_out"]["people"] == 8
        assert report["held_out"]["rows"] == report["held_out"]["images"] == 40
        assert [point["images"] for point in report["curve"]] == [100, 160]


def test_images_are_held_out_where_nobody_is_known(student: Adopted, faces: FaceSet, tmp_path: Path) -> None:
    unknown = FaceSet(faces.images, faces.rows, np.full(len(faces), -1), ())
    report = fit(student, unknown, targets_of(student, faces, 0.1, wide=True), tmp_path).report
    assert (report["held_out"]["by"], report["held_out"]["people"]) == ("images", 0)
    assert report["held_out"]["cosine"] > 0.9


def test_a_low_rank_map_is_the_best_of_its_rank(student: Adopted) -> None:
    import torch

    weight = RANDOM.normal(size=(WIDTH, DIM))
    network = student.network(DIM)
    network.set_map(weight, np.zeros(DIM), rank=3)
    with torch.no_grad():
        made = network.map(torch.eye(WIDTH)).numpy()
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(made, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)


def test_a_fitted_low_rank_map_has_that_rank_and_is_nearly_as_good(
    student: Adopted, faces: FaceSet, tmp_path: Path
) -> None:
    targets = targets_of(student, faces, 0.05, wide=True)
    whole, low = (fit(student, faces, targets, tmp_path, rank=rank) for rank in (None, 4))
    assert np.linalg.matrix_rank(low.weight, tol=1e-6) == 4
    assert 0.5 < low.report["held_out"]["cosine"] < whole.report["held_out"]["cosine"]
    with pytest.raises(InputError, match="--map-rank 6: saves nothing from 6 on"):
        fit(student, faces, targets, tmp_path, rank=6)


def test_what_is_kept_of_the_own_embedding_is_a_rotation_of_it_with_the_length_asked_for(
    student: Adopted, faces: FaceSet, tmp_path: Path
) -> None:
    targets = targets_of(student, faces, 0.3, wide=True)
    plain, kept = (fit(student, faces, targets, tmp_path, keep=keep) for keep in (0.0, 0.5))
    features = student.features.embed(faces.load(range(len(faces)), SIZE)).astype(np.float64)
    own = features @ student.weight + student.bias
    turned = features @ kept.own[0] + kept.own[1]
    np.testing.assert_allclose(turned @ turned.T, own @ own.T, rtol=1e-9, err_msg="cosines are those of the embedding")
    added = features @ (kept.weight - plain.weight) + kept.bias - plain.bias
    share = np.linalg.norm(added, axis=1) / np.linalg.norm(turned, axis=1)
    np.testing.assert_allclose(share, share[0], rtol=1e-9)
    predicted = np.sqrt(np.mean(np.sum((features @ plain.weight + plain.bias) ** 2, axis=1)))
    length = np.sqrt(np.mean(np.sum(added**2, axis=1)))
    assert length / predicted == pytest.approx(0.5, rel=0.1), "a good prediction's length is nearly the teacher's"


def test_people_are_held_out_whole() -> None:
    labels = np.repeat(np.arange(2 * FEWEST_PEOPLE), 3)
    held, by_people = hold_out(labels, np.random.default_rng(0))
    assert by_people
    assert set(labels[held]) & set(np.delete(labels, held)) == set()
    assert not hold_out(labels[: 3 * FEWEST_PEOPLE - 3], np.random.default_rng(0))[1]


def test_too_few_images(student: Adopted, faces: FaceSet, tmp_path: Path) -> None:
    few = faces.select(np.arange(19))
    with pytest.raises(InputError, match="19 images are too few"):
        fit(student, few, np.zeros((19, DIM), np.float32), tmp_path)
