"""pkd-evaluate: how far queries of one encoder may be trusted against a gallery of another, with intervals."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.certificates.signing import SigningKey, write_signed
from pkd.toolkit.cli.identification_table import identification_table
from pkd.toolkit.core.cli_support import Result, make_parser, progress, run
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.embed import default_cache
from pkd.toolkit.evaluation.comparison.outcome import Outcome
from pkd.toolkit.evaluation.datasets.ijb import read_templates
from pkd.toolkit.evaluation.datasets.pair_sources import read_pairs
from pkd.toolkit.evaluation.metrics.labels import read_labels
from pkd.toolkit.evaluation.metrics.resamples import write_draws
from pkd.toolkit.evaluation.protocols.all_pairs import cross_matrix
from pkd.toolkit.evaluation.protocols.baselines import require_control, with_maps
from pkd.toolkit.evaluation.protocols.common import Bar, Options
from pkd.toolkit.evaluation.protocols.encoder_set import Lineup
from pkd.toolkit.evaluation.protocols.pair_list import pair_list_accuracy
from pkd.toolkit.evaluation.protocols.templates import template_matching
from pkd.toolkit.evaluation.report.evaluation_page import render, require_plots, write_figures
from pkd.toolkit.evaluation.results.schema import Evaluation

EXAMPLES = """
  pkd-evaluate --teacher teacher.onnx --teacher-preprocess mean=127.5,std=127.5 --student run --faces test --out eval
  pkd-evaluate --teacher teacher-bundle --student student-bundle --gallery passports --probe selfies --out eval
  pkd-evaluate --teacher insightface:buffalo_l --pairs pairs.txt --faces lfw --flip --out lfw-view2
  pkd-evaluate --teacher teacher-bundle --student student-bundle --pairs agedb_30.bin --flip --out e
  pkd-evaluate --teacher teacher-bundle --student student-bundle --pairs cfp/Protocol/Split/FP --faces crops --out e
  pkd-evaluate --teacher teacher-bundle --student student-bundle --templates ijbc/meta --faces ijbc/loose_crop --out e
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pkd-evaluate``."""
    parser = make_parser(
        "pkd-evaluate",
        "Compare every pair of a set of aligned faces (or of a gallery and a probe set, or of an official pair list) "
        "with the teacher on both sides, the student on both sides, and the student's query against the teacher's "
        "gallery. Writes EVAL/report.html, EVAL/report.json and one certificate per ordered pair of encoders.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--teacher", required=True, metavar="SPEC", help="bundle, run, FILE.onnx, FILE.pt or insightface:PACK")
    add("--teacher-preprocess", metavar="P", help="of FILE.onnx or FILE.pt, for example mean=127.5,std=127.5")
    add("--student", metavar="SPEC", help="bundle or run of a student of this teacher")
    add("--control", metavar="SPEC", help="encoder that was not distilled from the teacher, to compare with")
    add("--control-preprocess", metavar="P", help="of a control that is FILE.onnx or FILE.pt")
    add("--fit-faces", type=Path, metavar="DIR|LIST", help="other people, to fit linear maps from control to teacher")
    add("--faces", type=Path, metavar="DIR|LIST", help="aligned crops: a folder per identity, a list, .rec or .tar")
    add("--gallery", type=Path, metavar="DIR|LIST", help="gallery side, where it has other images than the probe side")
    add("--probe", type=Path, metavar="DIR|LIST", help="probe (query) side")
    add("--pairs", type=Path, metavar="FILE", help="LFW's pairs.txt or CFP's Split/FP, of --faces DIR; or a .bin")
    add("--templates", type=Path, metavar="META", help="meta folder of IJB-B or IJB-C; --faces is its loose_crop")
    add("--no-detector-score", action="store_true", help="every face of a template weighs the same within its medium")
    add("--threshold-pairs", type=Path, metavar="FILE", help="list that the threshold of a one-fold --pairs is from")
    add("--fmr", type=float, nargs="+", metavar="F", help="target false match rates (1e-2 to 1e-5 where resolved)")
    add("--demographics", type=Path, metavar="FILE.csv", help="identity,<attribute>[,…]: also measure each group")
    add("--flip", action="store_true", help="add each embedding to its mirror image's; no certificates then")
    add("--any-space", action="store_true", help="allow a student that was not distilled from the teacher (a control)")
    add("--synthetic", action="store_true", help="the faces are procedural: say so in report and certificates")
    add("--bootstrap", type=int, default=Options.resamples, metavar="N", help="resamples of the identities (1000)")
    add("--seed", type=int, default=Options.seed, help="of the resampling (0)")
    add("--sign", type=Path, metavar="KEY.pem", help="ed25519 private key: sign the certificates and report.json")
    add("--cache", type=Path, metavar="DIR", help="keeps embeddings between runs ($PKD_CACHE or ~/.cache/pkd)")
    add("--jobs", type=int, metavar="N", help="threads (one per core)")
    add("--out", type=Path, required=True, metavar="EVAL", help="folder for the report and the certificates")
    return run(parser, evaluate, argv)


def evaluate(args: argparse.Namespace, console: Console) -> Result:
    """Run the protocol that the arguments ask for and write its results; returns what ``--json`` prints."""
    _check(args)
    key = SigningKey.read(args.sign) if args.sign else None
    options = Options(
        fmrs=tuple(args.fmr) if args.fmr else None,
        flip=args.flip,
        any_space=args.any_space,
        synthetic=args.synthetic,
        detector_score=not args.no_detector_score,
        resamples=args.bootstrap,
        seed=args.seed,
        cache=args.cache or default_cache(),
        jobs=args.jobs,
    )
    require_plots()
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"{args.out}: is a file. Give a folder with --out.")
    outcome = _measure(args, options, partial(progress, console))
    evaluation = outcome.evaluation
    _write(args.out, outcome, key)
    _show(console, evaluation, args.out)
    summary: dict[str, Any] = evaluation.model_dump(
        mode="json",
        exclude={
            "comparisons": {"__all__": {"det", "calibration", "genuine", "impostor"}},
            "agreement": {"histogram"},
            "identifications": {"__all__": {"curve"}},
        },
    )
    return {"out": str(args.out), **summary}


def _measure(args: argparse.Namespace, options: Options, bar: Callable[..., Any]) -> Outcome:
    if args.pairs:
        pairs = read_pairs(args.pairs, args.faces)
        threshold_pairs = read_pairs(args.threshold_pairs, args.faces) if args.threshold_pairs else None
        return pair_list_accuracy(
            pairs,
            _name(args.pairs) if args.pairs.is_dir() else args.pairs.name,
            _open(args, [each.faces for each in (pairs, threshold_pairs) if each], options, bar),
            options,
            bar,
            threshold_pairs=threshold_pairs,
            threshold_name=args.threshold_pairs.name if args.threshold_pairs else "",
        )
    if args.templates:
        templates = read_templates(args.templates, args.faces, scored=options.detector_score)
        lineup = _open(args, [templates.faces], options, bar)
        return template_matching(templates, _name(args.templates), lineup, options, bar)
    if args.faces:
        faces, probe, name = FaceSet.read(args.faces), None, _name(args.faces)
    else:
        faces, probe = FaceSet.read(args.gallery), FaceSet.read(args.probe)
        name = f"{_name(args.gallery)} (gallery), {_name(args.probe)} (probe)"
    labels = read_labels(args.demographics) if args.demographics else None
    if labels:
        labels = labels.matched(sorted({*faces.identities, *(probe.identities if probe else ())}))
    lineup = _open(args, [each for each in (faces, probe) if each], options, bar)
    return cross_matrix(faces, name, lineup, options, bar, probe=probe, labels=labels)


def _open(args: argparse.Namespace, evaluated: Sequence[FaceSet], options: Options, bar: Bar) -> Lineup:
    """The encoders; where there are ``--fit-faces``, with linear maps fitted on these and not on ``evaluated``."""
    lineup = Lineup(
        teacher=open_encoder(args.teacher, args.teacher_preprocess),
        student=open_encoder(args.student) if args.student else None,
        control=open_encoder(args.control, args.control_preprocess, option="--control-preprocess")
        if args.control
        else None,
    )
    require_control(lineup)
    if not args.fit_faces:
        return lineup
    return with_maps(lineup, FaceSet.read(args.fit_faces), _name(args.fit_faces), evaluated, options, bar)


def _check(args: argparse.Namespace) -> None:
    sides = [args.gallery, args.probe]
    if args.templates and (args.pairs or any(sides) or not args.faces):
        raise InputError("--templates META takes its images from --faces DIR and goes with no --pairs or --gallery.")
    if args.templates and args.demographics:
        raise InputError("--demographics goes with --faces or --gallery and --probe. Drop it, or --templates.")
    if args.no_detector_score and not args.templates:
        raise InputError("--no-detector-score goes with --templates META. Drop it.")
    if args.pairs and any(sides):
        raise InputError("--pairs FILE takes its images from --faces DIR or holds them: drop --gallery and --probe.")
    if not args.pairs and args.threshold_pairs:
        raise InputError("--threshold-pairs goes with --pairs. Drop it, or pass --pairs FILE.")
    if not args.pairs and (bool(args.faces) == any(sides) or any(sides) != all(sides)):
        raise InputError("what to compare? Pass --faces DIR, or --gallery DIR and --probe DIR.")
    if args.fit_faces and not args.control:
        raise InputError("--fit-faces goes with --control SPEC, the encoder that is mapped into the teacher's space.")
    if args.control_preprocess and not args.control:
        raise InputError("--control-preprocess states how --control scales pixels. Give --control, too.")
    if args.bootstrap < 100:
        raise InputError(f"--bootstrap {args.bootstrap}: a 95 % interval needs at least 100 resamples.")
    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: give 1 or more.")
    if args.pairs and args.demographics:
        raise InputError("--demographics goes with --faces or --gallery and --probe. Drop it, or --pairs.")
    if args.pairs and args.fmr:
        raise InputError("--fmr goes with --faces or --gallery and --probe: a pair list has too few impostor pairs.")
    if bad := [fmr for fmr in args.fmr or () if not 0 < fmr < 1]:
        raise InputError(f"--fmr {bad[0]:g}: a false match rate lies between 0 and 1.")


def _name(source: Path) -> str:
    return "/".join(source.resolve().parts[-2:])


def _write(out: Path, outcome: Outcome, key: SigningKey | None) -> None:
    """Certificates of an earlier run into the same folder are removed: they would pass for this run's."""
    folder = out / "certificates"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*__*.json"), *folder.glob("*__*.json.sig")]:
        stale.unlink()
    for certificate in outcome.certificates:
        write_signed(folder / certificate.file_name, (certificate.model_dump_json(indent=2) + "\n").encode(), key)
    write_draws(out, outcome.draws)
    write_signed(out / "report.json", (outcome.evaluation.model_dump_json(indent=2) + "\n").encode(), key)
    (out / "report.html").write_text(render(outcome.evaluation), encoding="utf-8")
    write_figures(outcome.evaluation, out / "figures")


def _show(console: Console, evaluation: Evaluation, out: Path) -> None:
    if evaluation.synthetic:
        console.print("[bold]Synthetic faces: these rates say nothing about people.[/bold]")
    if evaluation.comparisons:
        console.print(_matrix(evaluation))
    if evaluation.identifications:
        console.print(identification_table(evaluation))
    for found in evaluation.pair_accuracies:
        spread = f" ± {100 * found.fold_std:.2f} (standard deviation over folds)" if found.fold_std is not None else ""
        console.print(
            f"{found.name}  accuracy {100 * found.accuracy:.2f}{spread}, 95 % interval {_percents(found.ci95)}; "
            f"threshold from {found.threshold_from}"
        )
    if evaluation.agreement:
        one = "template" if evaluation.templates else "image"
        console.print(f"mean cosine of teacher and student on the same {one}: {evaluation.agreement.mean:.3f}")
    for attribute, names in (evaluation.labels.unlabelled if evaluation.labels else {}).items():
        if names:
            total = next(a.unlabelled for a in evaluation.comparisons[0].demographics if a.name == attribute)
            console.print(f"{total:,} identities have no {attribute} (first: {', '.join(names)})", markup=False)
    for note in evaluation.notes:
        console.print(note)
    for refusal in evaluation.comparisons[0].refused[:1] if evaluation.comparisons else ():
        console.print(refusal.reason)  # the report gives all of them
    console.print(f"report: {out / 'report.html'}")


def _matrix(evaluation: Evaluation) -> Table:
    table = Table(title="True accept rate, % with 95 % interval; query–gallery", title_justify="left")
    for heading in ("pair", "FMR", "identities alike", "pairs alike (raw)", "threshold"):
        table.add_column(heading, justify="left" if heading == "pair" else "right", no_wrap=True)
    for comparison in evaluation.comparisons:
        for point in comparison.points:
            table.add_row(
                comparison.name,
                f"{point.fmr:g}",
                f"{100 * point.tar_balanced:.1f} ({_percents(point.tar_balanced_ci95)})",
                f"{100 * point.tar:.1f} ({_percents(point.tar_ci95)})",
                f"{point.threshold:.3f}",
            )
        for refusal in comparison.refused:
            table.add_row(comparison.name, f"{refusal.fmr:g}", "not resolved", "", "")
        table.add_section()
    return table


def _percents(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"
