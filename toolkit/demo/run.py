"""Run the demo: match two devices' photographs across encoders, from training to HTTP, by the users' commands.

Every training, evaluation, export and server is a process of its own; this file imports none of their code. Without
``--faces`` the people are synthetic drawings and all that is measured on them says nothing about real people.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console

from pkd.toolkit.bundle.bundle import Bundle, is_bundle
from pkd.toolkit.certificates.certificate import Certificate, OperatingPoint
from pkd.toolkit.core.cli_options import Argument, Options
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.demo.faces import VISITOR_IMAGES, Groups, draw_groups, images_drawn, split_groups
from pkd.toolkit.demo.processes import Client, StepFailed, Steps, embedding_object
from pkd.toolkit.encoders.base import open_bundle

MARK = "demo.lock"
PARTS = ("faces", "cache", "runs", "evaluation", "bundles", "logs")
FILES = ("report.html", "demo.png", "demo.json")
TARGET_FMR = 1e-2
TEACHER, STUDENT, OWN_STUDENT, DIM = "mobilefacenet:0.35", "mobilefacenet:0.15", "mobilefacenet:0.5", "128"
STEPS = {"teacher": 400, "student": 500, "control": 250}
"""Steps and not minutes: on a busy machine the demo takes longer and tells the same."""
OWN_MINUTES = 3.0
SYNTHETIC = "size of the synthetic demo"
RECIPE = ["--batch", "16", "--margin", "softmax", "--scale", "20", "--lr", "4e-3", "--augment", "0.1"]
"""Options for a minute of training: small batches make many steps; without a margin the first ones count already."""


class DemoConfig(Options):
    """Hold what the demo runs on and for how long."""

    out: Annotated[Path, Argument("DIR")] = Path("demo")
    """Folder to write."""
    faces: Annotated[Path | None, Argument("DIR|LIST")] = None
    """Your aligned crops, one folder per person (pkd-align); synthetic ones where left out."""
    teacher: Annotated[str | None, Argument("SPEC")] = None
    """Your teacher, for --faces: FILE.onnx, FILE.pt, insightface:PACK, a bundle or a run; the demo trains one
    where left out."""
    teacher_preprocess: Annotated[str | None, Argument("P")] = None
    """Pixels of a teacher that is FILE.onnx or FILE.pt, for example mean=127.5,std=127.5."""
    minutes: float | None = None
    """Minutes of training a student of your own teacher; 3 by default."""
    port: int = 0
    """Port of the server; 0 picks a free one."""
    identities: Annotated[int, Argument(group=SYNTHETIC)] = 240
    """Synthetic people to train on."""
    images: Annotated[int, Argument(group=SYNTHETIC)] = 12
    """Images of each of them."""
    steps: Annotated[int | None, Argument(group=SYNTHETIC)] = None
    """Optimiser steps of each training; by default 400 of the teacher, 500 of the student, 250 of the control."""


@dataclass(frozen=True)
class Attempt:
    """Record one query over HTTP: who asked, against whose gallery image, and what the server decided."""

    query: Path
    gallery: Path
    genuine: bool
    match: bool
    score: float
    fmr_at_score: float
    fmr_ci95: tuple[float, float]


@dataclass
class Outcome:
    """Hold all that the picture, the page and the table tell."""

    synthetic: bool
    teacher: Bundle
    student: Bundle
    certificate: Certificate
    point: OperatingPoint
    attempts: list[Attempt]
    seconds: Mapping[str, float]
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def threshold(self) -> float:
        """Return the threshold that the server decides by at this operating point."""
        return (self.point.as_point or self.point).threshold

    def of(self, genuine: bool) -> list[Attempt]:
        """Return the genuine attempts, or the impostors', by ascending score."""
        return sorted((a for a in self.attempts if a.genuine is genuine), key=lambda a: a.score)

    def rate(self, genuine: bool) -> float:
        """Return the share of them that matched."""
        tried = self.of(genuine)
        return sum(a.match for a in tried) / len(tried)


def run_demo(config: DemoConfig, console: Console) -> Outcome:
    """Run the whole demo into ``config.out``. Raises StepFailed with the exit code of the command that failed."""
    _check(config)
    start, out = time.monotonic(), config.out
    with demo_folder(out):
        steps = Steps(out, console)
        groups = _faces(config, steps, console)
        parameters = _train(config, groups, steps)
        compared: list[str | Path] = []
        if config.faces is None:
            compared = ["--synthetic", "--control", out / "runs/control", "--fit-faces", groups.train]
        steps.run(
            "evaluate", "pkd-evaluate", *_teacher(config), "--student", out / "runs/student", "--faces", groups.test,
            *compared, "--cache", out / "cache", "--out", out / "evaluation",
        )  # fmt: skip
        teacher, student = (_export(config, steps, role) for role in ("teacher", "student"))
        certificate = _certificate(student, teacher)
        assured = [p for p in certificate.points if p.as_point] or certificate.points
        point = min(assured, key=lambda p: abs(np.log(p.fmr / TARGET_FMR)))
        with steps.serve("pkd-serve", teacher.path, student.path, "--port", str(config.port)) as server:
            console.print(f"  {server.url}", style="dim")
            with ConsoleProgress(console)("matching", 1) as advance:
                attempts = match_visitors(server, student, teacher, groups.visitors, point.fmr)
                advance(1)
        steps.seconds["total"] = time.monotonic() - start
        outcome = Outcome(
            config.faces is None, teacher, student, certificate, point, attempts, steps.seconds, parameters
        )
        _write(out, outcome)
        return outcome


def _faces(config: DemoConfig, steps: Steps, console: Console) -> Groups:
    with steps.timed("faces"):
        if config.faces is not None:
            return split_groups(config.out / "faces", config.faces)
        console.print("\n[bold]faces[/bold]\n  drawing synthetic people: nobody here exists")
        with ConsoleProgress(console)("faces", images_drawn(config.identities, config.images)) as advance:
            return draw_groups(config.out / "faces", config.identities, config.images, advance)


def _train(config: DemoConfig, groups: Groups, steps: Steps) -> dict[str, int]:
    """Train what is to be trained → the number of parameters by role.

    On synthetic faces the student's network is trained without the teacher, too, so that the report says what
    distillation bought; on your own it would take as long as the student.
    """
    synthetic = [("--method", "none", "--student", TEACHER, "--dim", DIM), ("--student", STUDENT)]
    synthetic += [("--method", "none", "--student", STUDENT, "--dim", DIM)]
    parameters = {}
    for role, words in zip(STEPS, synthetic, strict=True):
        given: list[str | Path] = list(words)
        if config.teacher is None:
            given += ["--name", f"demo-{role}", *RECIPE, "--steps", str(config.steps or STEPS[role])]
        elif role != "student":
            continue
        elif config.steps is not None:
            given = ["--student", OWN_STUDENT, "--steps", str(config.steps)]
        else:
            given = ["--student", OWN_STUDENT, "--max-minutes", f"{config.minutes or OWN_MINUTES:g}"]
        said = steps.run(
            role, "pkd-distill", *(_teacher(config) if role == "student" else []), *given, "--faces", groups.train,
            "--cache", config.out / "cache", "--json", "--out", config.out / "runs" / role,
        )  # fmt: skip
        if role != "control":
            parameters[role] = int(json.loads(said)["parameters"])
    return parameters


def _export(config: DemoConfig, steps: Steps, role: str) -> Bundle:
    """Export one encoder with its certificates. A teacher that is a bundle already is served as it is."""
    bundle, source = config.out / "bundles" / role, [config.out / "runs" / role]
    if role == "teacher" and config.teacher is not None:
        if is_bundle(Path(config.teacher)):
            return Bundle.open(config.teacher)
        source = [Path(config.teacher)] if Path(config.teacher).is_dir() else _teacher(config)  # a folder is a run
    steps.run(f"export {role}", "pkd-export", *source, "-o", bundle, "--certificates", config.out / "evaluation")
    return Bundle.open(bundle)


def _teacher(config: DemoConfig) -> list[Any]:
    """Name the teacher to the other commands."""
    scaled = ["--teacher-preprocess", config.teacher_preprocess] if config.teacher_preprocess else []
    return ["--teacher", config.teacher or config.out / "runs/teacher", *scaled]


def _certificate(student: Bundle, teacher: Bundle) -> Certificate:
    query, gallery = student.manifest.encoder.id, teacher.manifest.encoder.id
    for certificate in (*student.certificates(), *teacher.certificates()):
        if (certificate.query, certificate.gallery) == (query, gallery):
            return certificate
    raise StepFailed("export: the bundles hold no certificate for student queries against the teacher's gallery.", 1)


def match_visitors(server: Client, student: Bundle, teacher: Bundle, visitors: Path, fmr: float) -> list[Attempt]:
    """Enrol each visitor's first image with the teacher on the server, and match the others as queries.

    A query is embedded here, on the "phone", with nothing but onnxruntime and the student's bundle: its image never
    reaches the server. Each is tried against its own gallery image and those of the next twelve people.
    """
    faces, phone = FaceSet.read(visitors), open_bundle(student)
    info = phone.info
    by_person = [np.flatnonzero(faces.labels == person) for person in range(len(faces.identities))]
    gallery = [server.embed(faces.path(own[0]), teacher.manifest.encoder.id) for own in by_person]
    attempts = []
    for person, own in enumerate(by_person):
        for index in own[1:VISITOR_IMAGES]:
            vector = phone.embed(faces.load([index], info.preprocess.size))[0]
            query = embedding_object(vector, info.id, info.space.id)
            for offset in range(min(13, len(by_person))):
                other = (person + offset) % len(by_person)
                answer = server.verify(query, gallery[other], fmr)
                attempts.append(
                    Attempt(
                        faces.path(index), faces.path(by_person[other][0]), offset == 0, bool(answer["match"]),
                        float(answer["score"]), float(answer["fmr_at_score"]), tuple(answer["fmr_ci95"]),
                    )
                )  # fmt: skip
    return attempts


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as plain data: what ``--json`` prints and ``demo.json`` holds."""
    point = outcome.point
    return {
        "synthetic": outcome.synthetic,
        "teacher": outcome.teacher.manifest.encoder.id,
        "student": outcome.student.manifest.encoder.id,
        "parameters": dict(outcome.parameters),
        "bytes": {
            role: (bundle.path / "encoder.onnx").stat().st_size
            for role, bundle in (("teacher", outcome.teacher), ("student", outcome.student))
        },
        "target_fmr": point.fmr,
        "threshold": outcome.threshold,
        "genuine": _counted(outcome, True) | {"expected": point.tar, "expected_ci95": point.tar_ci95},
        "impostor": _counted(outcome, False) | {"expected": point.fmr, "expected_ci95": point.fmr_ci95},
        "seconds": {name: round(value, 1) for name, value in outcome.seconds.items()},
    }


def _counted(outcome: Outcome, genuine: bool) -> dict[str, Any]:
    tried = outcome.of(genuine)
    return {"queries": len(tried), "matched": sum(a.match for a in tried), "rate": outcome.rate(genuine)}


def _write(out: Path, outcome: Outcome) -> None:
    from pkd.toolkit.demo.figure import draw_picture, page  # matplotlib takes a second

    draw_picture(outcome, out / "demo.png")
    figures = summary(outcome)
    report = (out / "evaluation/report.html").read_text(encoding="utf-8")
    (out / "report.html").write_text(page(report, figures, out / "demo.png"), encoding="utf-8")
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _check(config: DemoConfig) -> None:
    if (config.faces is None) != (config.teacher is None):
        raise InputError("--faces and --teacher go together: your own crops and the teacher that embeds them.")
    if config.teacher_preprocess and not config.teacher:
        raise InputError("--teacher-preprocess states how --teacher scales pixels. Give --teacher, too.")
    if config.faces is not None and not config.faces.exists():
        raise InputError(f"{config.faces}: no such folder or list file. Give aligned crops; pkd-align makes them.")
    if config.minutes is not None and config.faces is None:
        raise InputError("--minutes goes with --faces and --teacher. The synthetic demo trains by --steps.")
    if config.minutes is not None and config.steps is not None:
        raise InputError("--minutes and --steps: give one of them.")
    if any(given is not None and given <= 0 for given in (config.minutes, config.steps)):
        raise InputError("--minutes and --steps must be above 0.")
    if config.identities < 2 or config.images < 2:
        raise InputError("--identities and --images: give at least 2 people with 2 images each.")


@contextmanager
def demo_folder(out: Path) -> Iterator[None]:
    """Make ``out``, or clear what an earlier demo left in it; one demo at a time in a folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file. Give a folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise InputError(f"{out}: not empty and not the folder of an earlier demo. Give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / MARK).open("w") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another demo is running in it. Wait, or give another --out.") from None
        for part in PARTS:
            shutil.rmtree(out / part, ignore_errors=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        yield
