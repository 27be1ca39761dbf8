"""Every protocol on real faces and teachers, against figures that were measured independently of pkd.

Embeddings are kept in $PKD_CACHE where it is set, so that all of LFW is embedded once and not in every run.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.cli.evaluate import main
from pkd.toolkit.evaluation.datasets.lfw import read_lfw
from pkd.toolkit.evaluation.results.schema import Evaluation
from pkd.toolkit.images.codec import Rgb, read_rgb
from tests.support.ijb_files import write_ijb

pytestmark = pytest.mark.shared
EDGEFACE = ("teacher_edgeface_xs_512.onnx", "mean=127.5,std=127.5")
MOBILEFACENET = ("teacher_mobilefacenet_y1_128.onnx", "mean=0,std=1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name the folder of embeddings that the tests share."""
    return Path(os.environ.get("PKD_CACHE") or tmp_path_factory.mktemp("cache"))


def evaluate(shared: Path, out: Path, cache: Path, teacher: tuple[str, str], *more: str | Path) -> Evaluation:
    given = ["--teacher", shared / "models" / teacher[0], "--teacher-preprocess", teacher[1], *more]
    given += ["--bootstrap", "200", "--cache", cache, "--out", out]
    assert main([str(a) for a in given]) == 0
    return Evaluation.model_validate_json((out / "report.json").read_bytes())


def part_of_view_2(shared: Path, path: Path, count: int = 30) -> Path:
    """Write the first ``count`` genuine and impostor pairs of each fold of View 2."""
    lines = (shared / "faces/lfw/protocol/pairs.txt").read_text().splitlines()[1:]
    kept = [lines[600 * fold + at + i] for fold in range(10) for at in (0, 300) for i in range(count)]
    path.write_text("\n".join([f"10\t{count}", *kept]))
    return path


@pytest.mark.soak
@pytest.mark.parametrize(
    ("teacher", "flip", "accuracy", "spread"),
    [(EDGEFACE, [], 0.9950, 0.0025), (MOBILEFACENET, ["--flip"], 0.9938, 0.0039)],
)
def test_view_2_reproduces_the_independent_figures(
    shared: Path,
    tmp_path: Path,
    cache: Path,
    teacher: tuple[str, str],
    flip: list[str],
    accuracy: float,
    spread: float,
    soak: bool,
) -> None:
    """Those were measured with thresholds from a grid, ours lie between two scores: six of 6,000 pairs may differ.

    In the short form a part of the pairs, where three in a hundred may be wrong; the second teacher is slow.
    """
    lfw = shared / "faces/lfw"
    count = 300 if soak else 5 if flip else 30
    pairs = lfw / "protocol/pairs.txt" if soak else part_of_view_2(shared, tmp_path / "part.txt", count)
    more: tuple[str | Path, ...] = ("--pairs", pairs, "--faces", lfw / "aligned", *flip)
    (found,) = evaluate(shared, tmp_path / "e", cache, teacher, *more).pair_accuracies
    assert len(found.fold_accuracy) == 10 and found.genuine_pairs == found.impostor_pairs == 10 * count
    if soak:
        assert found.accuracy == pytest.approx(accuracy, abs=6 / 6000)
        assert found.fold_std == pytest.approx(spread, abs=0.001)
    else:
        assert found.accuracy > 0.97


def test_a_bin_of_real_crops_has_exactly_the_accuracy_of_its_list(shared: Path, tmp_path: Path, cache: Path) -> None:
    lfw = shared / "faces/lfw"
    pairs = read_lfw(part_of_view_2(shared, tmp_path / "some.txt"), lfw / "aligned")
    images = [pairs.faces.images.read(int(i)) for pair in zip(pairs.first, pairs.second, strict=True) for i in pair]
    (tmp_path / "some.bin").write_bytes(pickle.dumps((images, pairs.same.tolist()), 2))
    listing = ("--pairs", tmp_path / "some.txt", "--faces", lfw / "aligned")
    (listed,) = evaluate(shared, tmp_path / "a", cache, EDGEFACE, *listing).pair_accuracies
    packed = evaluate(shared, tmp_path / "b", cache, EDGEFACE, "--pairs", tmp_path / "some.bin")
    (found,) = packed.pair_accuracies
    assert listed.accuracy > 0.98
    assert (found.accuracy, found.fold_accuracy, found.fold_threshold) == (
        listed.accuracy,
        listed.fold_accuracy,
        listed.fold_threshold,
    )
    assert packed.data.images == len(set(images))


def test_templates_of_real_crops_are_found(shared: Path, tmp_path: Path, cache: Path) -> None:
    """60 people of LFW, laid out as IJB-C: the teacher finds all of them, and more surely than from single images."""
    people: dict[str, list[Rgb]] = {}
    for folder in sorted((shared / "faces/lfw/aligned").iterdir()):
        files = sorted(folder.iterdir())
        if len(files) >= 5 and len(people) < 60:
            people[folder.name] = [read_rgb(path) for path in files[:8]]
    meta = write_ijb(tmp_path / "ijb", people)
    more = ("--templates", meta, "--faces", meta.parent / "loose_crop", "--fmr", "0.01")
    made = evaluate(shared, tmp_path / "e", cache, EDGEFACE, *more)
    (found,), (comparison,) = made.identifications, made.comparisons
    assert found.mated_identities == found.non_mated_identities == 60 and found.enrolled == (30, 30)
    assert found.ranks[0].rate_balanced >= 0.98
    assert comparison.points[0].tar_balanced >= 0.98
    assert comparison.impostor_pairs == 59 * comparison.genuine_pairs
    assert np.isclose(found.min_fpir or 0, 1 / 6)
