"""Prepare a training before its first step: images, teacher embeddings, an audited head."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from pkd.toolkit.core.errors import BadHead, InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.data.face_set import FaceSet, join
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.audit import Audit
from pkd.toolkit.distill.heads.head import Head
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.heads.resolve import Classes, HeadChoice, resolve_head
from pkd.toolkit.distill.losses.feature_hooks import StagePlan, plan_stages
from pkd.toolkit.distill.losses.registry import WeightedSum
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.layers import Backbone
from pkd.toolkit.distill.models.open_encoder import reopener
from pkd.toolkit.distill.training.frozen import FrozenFeatures, store_features
from pkd.toolkit.distill.training.views import MappedRows, StoredViews, Teaching, ViewMaker
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.encoders.embed import default_cache, embed_stored
from pkd.toolkit.encoders.preprocessing_check import check_preprocessing

if TYPE_CHECKING:
    from pkd.toolkit.distill.models.adopted import Adopted, AdoptedNetwork

Measure = Callable[[Embeddings, Embeddings, NDArray[np.int64]], Mapping[str, Any]]
"""Student's rows, teacher's rows and labels of held-out images → what is reported of them."""
CHECKED = 512
"""Real crops that measure the statistics of batch normalisation; some of them check the adoption."""
FROZEN, FROZEN_SHRUNK, MOST_FROZEN = 0.9, 0.75, 100_000
"""Share of an adopted student that is frozen by default, less where all layers were shrunk, and for how many images at
most."""
FEWEST_PEOPLE, MOST_PEOPLE = 100, 500
"""People with two images from which on some are held out, and how many of them at most."""


@dataclass(frozen=True)
class Start:
    """Hold an adopted student as its training begins: with its map fitted, and batch normalisation where it had been.

    ``mapped``: computes its rows before any step, float32 N×D. ``report``: how the map was fitted and how it does.
    ``own``: the model's own embeddings in the teacher's space, which the student is to keep.
    """

    name: str
    source: str
    preprocess: Preprocess
    network: Backbone
    mapped: Callable[[FaceSet], Embeddings]
    report: dict[str, Any]
    frozen: FrozenFeatures | None = None
    own: MappedRows | None = None


@dataclass(frozen=True)
class Prepared:
    """Hold the data of a training.

    ``targets``: the teacher's unit embeddings of every image, plain and mirrored, each N×D and read by index from
    disk; None without a teacher.

    ``labels``: int64 N into the head's rows (or the identities, where the head is trained), −1 where unknown.
    ``exclude``: int64 C×2 by row of the head, the range of rows that a sample's denominator leaves out; None where that
    is its own row alone.
    ``start``: the adopted student; None where a backbone of the zoo is built.
    ``held_out``: people that the training does not see; None where there are too few.
    ``frozen``: what the student's frozen layers give for every image; None where all layers are trained.
    """

    faces: FaceSet
    labels: NDArray[np.int64]
    data_digest: str
    targets: tuple[Rows, Rows] | None
    head: Head | None
    audit: Audit | None
    identities: tuple[str, ...]
    exclude: NDArray[np.int64] | None = None
    stages: StagePlan | None = None
    views: StoredViews | None = None
    live: Encoder | None = None
    start: Start | None = None
    held_out: FaceSet | None = None
    frozen: FrozenFeatures | None = None
    seconds: float = 0.0
    """Time that all of this took, which counts towards ``--max-minutes``."""

    @property
    def teaching(self) -> Teaching:
        """Say where the teacher's embeddings of a batch come from."""
        return Teaching(self.targets, self.views, self.live, self.start.own if self.start else None)

    @property
    def people(self) -> NDArray[np.int64]:
        """Return int64 N: the identity of every image, −1 where unknown; rows of one person may be many in a head."""
        return self.labels if self.exclude is None else self.faces.labels


def prepare(
    config: DistillConfig, teacher: Encoder | None, console: Console, measure: Measure = lambda *rows: {}
) -> Prepared:
    """Read the images, embed them with the teacher (cached), resolve the head and refuse it if the audit does.

    An adopted student is opened, checked and mapped. ``measure``: what else is reported of the map.
    """
    began = time.monotonic()
    method = WeightedSum.parse(config.method)
    if method.needs_teacher and teacher is None:
        raise InputError(f"--method {config.method}: needs --teacher. Without one, --method none trains a teacher.")
    if "margindistillation" in method.names and Margin.parse(config.margin).kind == "softmax":
        raise InputError(f"--method {config.method}: varies a margin and --margin softmax has none. Use arcface:0.5.")
    if config.mix and method.needs_labels:
        raise InputError(
            f"--mix {config.mix}: --method {config.method} needs labels, and a mixed face has none. Add l2kd."
        )
    if config.freeze and method.stages:
        raise InputError(f"--freeze {config.freeze}: --method {config.method} trains early layers. Use --freeze 0.")
    if "map" in method.names and (len(method.names) > 1 or not config.adopts):
        raise InputError(f"--method {config.method}: map stands alone, for --student FILE.onnx, a model that exists.")
    if config.adopts and teacher is None:
        raise InputError(f"--student {config.student}: a model is adopted for a teacher's space. Give --teacher.")
    early = method.stages and not config.adopts  # what cannot be served is refused before any work
    stages = _plan(config, teacher, method.stages, None) if teacher and early else None
    choice = HeadChoice.parse(config.head, config.teacher) if method.head in {"frozen", "ema"} else None
    faces = _read_faces(config, method, choice, console)
    if len(faces) < config.batch:
        raise InputError(f"{len(faces):,} images are fewer than --batch {config.batch}. Give more or a smaller batch.")
    held_out = None
    if method.aligns and method.names != ("map",) and (choice is None or choice.kind in {"means", "fit", "images"}):
        faces, held_out = _set_aside(faces, config.held_out)
    student = _adopt(config, teacher, faces, console) if config.adopts and teacher else None
    if student and teacher and method.stages:
        stages = _plan(config, teacher, method.stages, student)
    doubt = check_preprocessing(teacher, faces, reopener(config.teacher)) if teacher and config.teacher else None
    if doubt:
        console.print(f"warning: {doubt}", markup=False, soft_wrap=True)
    targets = _targets(config, teacher, faces, console) if teacher else None
    start = _start(config, student, faces, targets[0], console, measure) if student and targets else None
    classes = Classes(None, faces.labels, faces.identities, None)
    if teacher and targets:
        key = f"{teacher.info.id} {faces.digest()}{'' if config.mirror else ' not mirrored'}"
        classes = resolve_head(config, choice, targets, faces.labels, faces.identities, key, console)
    if classes.audit and classes.audit.fault and choice:
        raise BadHead(f"{doubt} Then look at the head: {classes.audit.fault}" if doubt else classes.audit.fault)
    exclude = classes.head.exclude if classes.head else None
    views = _views(config, teacher, faces, console) if teacher and config.views else None
    live = teacher if config.teacher_live else None
    return Prepared(
        faces, classes.labels, faces.digest(), targets, classes.head, classes.audit, classes.identities, exclude,
        stages, views, live, start, held_out, start.frozen if start else None, time.monotonic() - began,
    )  # fmt: skip


def _adopt(config: DistillConfig, teacher: Encoder, faces: FaceSet, console: Console) -> Adopted:
    """Open the student, check it on some of the faces, and shrink it. Raises InputError for one of other alignment."""
    from pkd.toolkit.distill.models.adopted import adopt

    size = teacher.info.preprocess.size
    crops = faces.load(_some(config, faces)[::16], size)
    student = adopt(config.student, config.student_preprocess, crops)
    if student.info.preprocess.size != size or student.info.preprocess.template != teacher.info.preprocess.template:
        raise InputError(
            f"--student {config.student}: takes {student.info.preprocess.name} crops, the teacher "
            f"{teacher.info.preprocess.name}. Adopt a model of the same alignment and crop size."
        )
    if config.shrink is None:
        return student
    from pkd.toolkit.distill.models.shrinking import shrink

    some = faces.load(_some(config, faces), size)
    with ConsoleProgress(console)("shrinking", None) as advance:
        return shrink(
            student, config.shrink, some, teacher.embed(some), config.map_rank, threads=config.threads, advance=advance
        )


def _some(config: DistillConfig, faces: FaceSet) -> NDArray[np.int64]:
    """Draw the images that the adoption is measured on."""
    random = np.random.default_rng(config.seed)
    return np.sort(random.choice(len(faces), min(len(faces), CHECKED), replace=False))


def _start(
    config: DistillConfig, student: Adopted, faces: FaceSet, targets: Rows, console: Console, measure: Measure
) -> Start:
    """Fit the student's map, and put back its batch normalisation where it will be trained."""
    from pkd.toolkit.distill.training.closed_form import fit_map

    cache = Path(config.cache) if config.cache else default_cache()
    low, whole = student.own_rank(targets.shape[1]), min(student.width, targets.shape[1])
    rank = config.map_rank or low
    if low and rank and rank >= whole:
        rank = None
    elif low and not config.map_rank:
        console.print(
            f"last layer: two with {low} values in between, as the student has; --map-rank {whole} makes it whole"
        )
    if config.keep and rank:
        remedy = f"Add --map-rank {whole}" if low else "Leave --map-rank out"
        raise InputError(f"--keep {config.keep}: needs a whole last layer. {remedy}, or leave --keep out.")
    if config.keep and student.weight.shape[1] > targets.shape[1]:
        raise InputError(
            f"--keep {config.keep}: the student's own embedding has {student.weight.shape[1]} numbers, more than the "
            f"teacher's {targets.shape[1]}. Leave --keep out."
        )
    with ConsoleProgress(console)("student features", len(faces)) as advance:
        fitted = fit_map(
            student, targets, faces, cache=cache, measure=measure, refit=True, rank=rank,
            keep=config.keep, seed=config.seed, jobs=config.threads, advance=advance,
        )  # fmt: skip
    own = None
    if fitted.own:
        features = embed_stored(student.features, faces, cache=cache, jobs=config.threads)
        own = MappedRows(features, *fitted.own, length=config.keep)
    network = student.network(targets.shape[1])
    network.set_map(fitted.weight, fitted.bias, rank)
    frozen = _freeze(config, student, network, faces, console, cache)
    if config.method != "map":
        some, preprocess = _some(config, faces), student.info.preprocess
        chunks = (some[i : i + 64] for i in range(0, len(some), 64))
        network.restore_batch_norm(torch.from_numpy(preprocess(faces.load(chunk, preprocess.size))) for chunk in chunks)

    def mapped(others: FaceSet) -> Embeddings:
        rows = embed_stored(student.features, others, cache=cache, jobs=config.threads)[:]
        return unit_rows((rows @ fitted.weight + fitted.bias).astype(np.float32), "the map")

    info = student.info
    return Start(info.name, info.id, info.preprocess, network, mapped, fitted.report, frozen, own)


def _frozen_share(config: DistillConfig, faces: FaceSet) -> float:
    """Choose how much of the student is frozen."""
    if config.freeze is not None:
        return config.freeze
    asked = WeightedSum.parse(config.method).stages or config.method == "map"
    if asked or torch.cuda.is_available() or len(faces) > MOST_FROZEN:
        return 0.0
    return FROZEN if config.shrink is None else FROZEN_SHRUNK


def _freeze(
    config: DistillConfig, student: Adopted, network: AdoptedNetwork, faces: FaceSet, console: Console, cache: Path
) -> FrozenFeatures | None:
    """Freeze the first layers, and compute once what they give for every image."""
    share = _frozen_share(config, faces)
    from pkd.toolkit.distill.models.cutting import choose_cut

    cut = choose_cut(network, share) if share else None
    if cut is None and config.freeze:
        raise InputError(f"--freeze {share:g}: the student has no layer up to which so little is done. Use --freeze 0.")
    if cut is None:
        return None
    network.freeze(cut.step)
    views = 1 + config.mirror
    size = 2 * int(np.prod(cut.shape)) * views * len(faces) / 2**20
    console.print(
        f"frozen: {cut.share:.0%} of the student's arithmetic, kept as {'×'.join(map(str, cut.shape))} numbers an "
        f"image{' and its mirror image' if config.mirror else ''}: {size:,.0f} MB in {cache}"
    )
    with ConsoleProgress(console)("frozen layers", views * len(faces)) as advance:
        return store_features(
            student, cut, faces, mirror=config.mirror, cache=cache, jobs=config.threads, advance=advance
        )


def _set_aside(faces: FaceSet, share: float) -> tuple[FaceSet, FaceSet | None]:
    """Keep some people for the check at the end: chosen by their names, so that every training leaves out the same."""
    counts = np.bincount(faces.labels[faces.labels >= 0], minlength=len(faces.identities))
    if share == 0 or (counts > 1).sum() < FEWEST_PEOPLE:
        return faces, None
    order = sorted(range(len(faces.identities)), key=lambda i: sha256(faces.identities[i].encode()).digest())
    chosen = order[: min(MOST_PEOPLE, max(1, round(share * len(order))))]
    held = np.isin(faces.labels, chosen)
    return faces.select(np.flatnonzero(~held)), faces.select(np.flatnonzero(held))


def _plan(config: DistillConfig, teacher: Encoder, least: int, adopted: Adopted | None) -> StagePlan:
    size = teacher.info.preprocess.size
    dim = teacher.info.space.dim
    student = adopted.network(dim) if adopted else build(config.student, dim, size)
    return plan_stages(teacher, config.teacher_stages, student, size, least, config.threads or os.cpu_count() or 1)


def _read_faces(config: DistillConfig, method: WeightedSum, choice: HeadChoice | None, console: Console) -> FaceSet:
    nothing = FaceSet.read()
    faces = FaceSet.read(*config.faces) if config.faces else nothing
    unlabelled = FaceSet.read(*config.unlabelled, labelled=False) if config.unlabelled else nothing
    if method.needs_labels and not (choice and choice.kind == "images"):
        if len(faces.identities) < 2:
            raise InputError(
                f"{' '.join(config.faces) or '--faces'}: {len(faces.identities)} identities; --method {config.method} "
                "classifies them and needs at least 2. Give --faces with a folder for each, or --method l2kd."
            )
        if len(unlabelled):
            console.print(f"--method {config.method} uses labels only: {len(unlabelled):,} unlabelled images left out.")
        return faces
    return join(faces, unlabelled)


def _views(config: DistillConfig, teacher: Encoder, faces: FaceSet, console: Console) -> StoredViews:
    """Embed the augmented views that the student will see."""
    size = teacher.info.preprocess.size
    maker = ViewMaker(faces, size, augment=config.augment, mirror=config.mirror, mix=config.mix)
    views = StoredViews(maker, config.views, config.seed, Path(config.cache) if config.cache else default_cache())
    with ConsoleProgress(console)("teacher embeddings of views", config.views * len(faces)) as advance:
        views.embed(teacher, config.threads, advance)
    return views


def _targets(config: DistillConfig, teacher: Encoder, faces: FaceSet, console: Console) -> tuple[Rows, Rows]:
    cache = Path(config.cache) if config.cache else default_cache()
    mirrors = config.mirror and config.method != "map"
    with ConsoleProgress(console)("teacher embeddings", (1 + mirrors) * len(faces)) as advance:
        plain = embed_stored(teacher, faces, cache=cache, jobs=config.threads, advance=advance)
        if not mirrors:
            return plain, plain
        mirrored = embed_stored(teacher, faces, flip=True, cache=cache, jobs=config.threads, advance=advance)
    return plain, mirrored
