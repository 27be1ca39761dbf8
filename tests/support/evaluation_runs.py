"""Folders as pkd-evaluate writes them, from points instead of faces; all after the embedding is the real thing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import Embeddings, unit_rows
from pkd.toolkit.evaluation.metrics.bootstrap import interval, resampled_accuracies
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Ints, Pairing
from pkd.toolkit.evaluation.metrics.resamples import ResampleValues, resampled_from, write_resample_values
from pkd.toolkit.evaluation.results.schema import Comparison, Data, Evaluation, PairAccuracy

TEACHER = describe("teacher", "teacher", "1" * 64, Preprocess(), 8)


def cloud(people: int, noise: float, seed: int = 0) -> Embeddings:
    """Three points around each of ``people`` centres; the noise is the same, only scaled."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(people, 8))
    return unit_rows((np.repeat(centres, 3, axis=0) + noise * random.normal(size=(3 * people, 8))).astype(np.float32))


def write_run(
    folder: Path,
    *,
    name: str | None,
    noise: float,
    people: int = 50,
    seed: int = 0,
    resamples: int = 200,
    protocol: str = "all pairs of one set",
    accuracy: bool = False,
) -> Evaluation:
    """Write report.json and draws.npz of a student of this noise; of the teacher alone where ``name`` is None."""
    labels = np.repeat(np.arange(people), 3)
    files = np.arange(len(labels))
    sides = {"T": cloud(people, 0.3), "S": cloud(people, noise)}
    student = name and describe(
        name, "student", hashlib.sha256(f"{noise}".encode()).hexdigest(), Preprocess(), 8, space=TEACHER.space
    )
    infos = {"T": TEACHER, "S": student or TEACHER}
    comparisons: list[Comparison] = []
    accuracies: list[PairAccuracy] = []
    values: dict[str, Doubles] = {}
    for cell in ("T–T", "S–T", "S–S") if student else ("T–T",):
        q, g = cell.split("–")
        if accuracy:
            found, drawn = _accuracy(cell, sides[q], sides[g], labels, resamples, seed)
            accuracies.append(found.model_copy(update={"query": infos[q].id, "gallery": infos[g].id}))
            values[f"{cell}/accuracy"] = drawn
            continue
        scores = score_pairs(Pairing(labels, labels, files, files, people, unordered=q == g), sides[q], sides[g])
        comparison, told = measure(scores, cell, infos[q], infos[g], fmrs=(0.01,), resamples=resamples, seed=seed)
        comparisons.append(comparison)
        values |= told
    evaluation = Evaluation(
        tool="pkd test",
        created="2026-01-02T03:04:05+00:00",
        protocol=protocol,
        data=Data(
            name="points",
            content_digest=hashlib.sha256(str(people).encode()).hexdigest(),
            images=len(labels),
            identities=people,
            single_image_identities=0,
        ),
        synthetic=True,
        flip=False,
        resamples=resamples,
        seed=seed,
        teacher=TEACHER,
        student=student or None,
        training={"T": {"method": "none", "steps": 1000}, **({"S": {"method": "l2kd"}} if student else {})},
        comparisons=tuple(comparisons),
        pair_accuracies=tuple(accuracies),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(evaluation.model_dump_json(), encoding="utf-8")
    write_resample_values(folder, ResampleValues(resampled_from(evaluation), values))
    return evaluation


def _accuracy(
    cell: str, query: Embeddings, gallery: Embeddings, labels: Ints, resamples: int, seed: int
) -> tuple[PairAccuracy, Doubles]:
    first = np.arange(0, len(labels), 3)
    second = np.concatenate([first + 1, np.roll(first, 1)])
    first = np.concatenate([first, first])
    same = labels[first] == labels[second]
    right = (np.einsum("nd,nd->n", query[first], gallery[second]) >= 0.5) == same
    drawn = resampled_accuracies(right, same, labels[first], labels[second], resamples=resamples, seed=seed)
    return PairAccuracy(
        name=cell,
        query="",
        gallery="",
        accuracy=float(right.mean()),
        fold_std=None,
        ci95=interval(drawn),
        fold_accuracy=(float(right.mean()),),
        fold_threshold=(0.5,),
        threshold_from="a test",
        genuine_pairs=int(same.sum()),
        impostor_pairs=int((~same).sum()),
    ), drawn
