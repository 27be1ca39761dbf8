"""Run pkd-evaluate: measure how far queries of one encoder may be trusted against another's gallery, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import model_validator
from rich.console import Console
from rich.table import Table

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.certificates.signing import SigningKey, write_signed
from pkd.toolkit.core.cli_options import Argument, Options, run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import ConsoleProgress, Progress
from pkd.toolkit.core.results_folder import replaced
from pkd.toolkit.core.tables import show_table
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.seen import seen_in
from pkd.toolkit.distill.models.open_encoder import open_encoder, reopener
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.encoders.embed import default_cache
from pkd.toolkit.encoders.preprocessing_check import check_preprocessing
from pkd.toolkit.encoders.space_map import SpaceMap
from pkd.toolkit.evaluation.datasets.cfp import read_cfp
from pkd.toolkit.evaluation.datasets.ijb import read_templates
from pkd.toolkit.evaluation.datasets.insightface_bin import looks_pickled, read_bin
from pkd.toolkit.evaluation.datasets.lfw import read_lfw
from pkd.toolkit.evaluation.datasets.pair_list import PairList
from pkd.toolkit.evaluation.metrics.labels import read_labels
from pkd.toolkit.evaluation.metrics.resamples import write_resample_values
from pkd.toolkit.evaluation.protocols.all_pairs import cross_matrix
from pkd.toolkit.evaluation.protocols.baselines import require_control, with_maps
from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions, ProtocolResult, require_unseen
from pkd.toolkit.evaluation.protocols.pair_list import pair_list_accuracy
from pkd.toolkit.evaluation.protocols.registry import find_protocol
from pkd.toolkit.evaluation.protocols.templates import template_matching
from pkd.toolkit.evaluation.report.drawing import require_plots
from pkd.toolkit.evaluation.report.reports import render, render_worst, verdicts
from pkd.toolkit.evaluation.results.schema import Evaluation

RESULTS = ("certificates/*__*.json*", "figures/*.png", "report.json*", "report.html", "worst.html", "draws.npz")
"""Files that an evaluation consists of."""
EXAMPLES = """
  pkd-evaluate --teacher teacher.onnx --teacher-preprocess mean=127.5,std=127.5 --student run --faces test --out eval
  pkd-evaluate --teacher teacher-bundle --student student-bundle --gallery passports --probe selfies --out eval
  pkd-evaluate --teacher new-bundle --student student-bundle --mapped map.npz --old old-bundle --faces test --out e
  pkd-evaluate --teacher insightface:buffalo_l --pairs pairs.txt --faces lfw --flip --out lfw-view2
  pkd-evaluate --teacher teacher-bundle --student student-bundle --pairs agedb_30.bin --flip --out e
  pkd-evaluate --teacher teacher-bundle --student student-bundle --pairs cfp/Protocol/Split/FP --faces crops --out e
  pkd-evaluate --teacher teacher-bundle --student student-bundle --templates ijbc/meta --faces ijbc/loose_crop --out e
"""
Faces = Annotated[Path | None, Argument("DIR|LIST")]
Spec = Annotated[str | None, Argument("SPEC")]


class EvaluateOptions(Options):
    """Hold what pkd-evaluate was asked for."""

    teacher: Annotated[str, Argument("SPEC")]
    """Teacher: bundle, run, FILE.onnx, FILE.pt or insightface:PACK."""
    teacher_preprocess: Annotated[str | None, Argument("P")] = None
    """Pixel scaling of a teacher that is FILE.onnx or FILE.pt, for example mean=127.5,std=127.5."""
    student: Spec = None
    """Bundle or run of a student of this teacher."""
    mapped: Annotated[Path | None, Argument("MAP.npz")] = None
    """Map of pkd-map: also compare with the mapped templates of the old encoder."""
    old: Spec = None
    """Old encoder that --mapped was fitted for."""
    old_preprocess: Annotated[str | None, Argument("P")] = None
    """Pixel scaling of an old encoder that is FILE.onnx or FILE.pt."""
    control: Spec = None
    """Encoder that was not distilled from the teacher, to compare with."""
    control_preprocess: Annotated[str | None, Argument("P")] = None
    """Pixel scaling of a control that is FILE.onnx or FILE.pt."""
    fit_faces: Faces = None
    """Aligned crops of other people, to fit linear maps from control to teacher."""
    faces: Faces = None
    """Aligned crops: a folder per identity, a list, .rec or .tar."""
    gallery: Faces = None
    """Aligned crops of the gallery side, where it has other images than the probe side."""
    probe: Faces = None
    """Aligned crops of the probe (query) side."""
    pairs: Annotated[Path | None, Argument("FILE")] = None
    """Pair list: LFW's pairs.txt or CFP's Split/FP, of --faces DIR; or a .bin with its own images."""
    templates: Annotated[Path | None, Argument("META")] = None
    """Meta folder of IJB-B or IJB-C; --faces is its loose_crop."""
    protocol: Annotated[str | None, Argument("NAME")] = None
    """Protocol to run on --faces: all-pairs (default), reject (what limits of quality buy) or MODULE:NAME."""
    no_detector_score: bool = False
    """Weigh every face of a template the same within its medium."""
    threshold_pairs: Annotated[Path | None, Argument("FILE")] = None
    """Pair list that the threshold of a one-fold --pairs comes from."""
    fmr: Annotated[tuple[float, ...], Argument("F")] = ()
    """Target false match rates, fractions; without it 1e-2 to 1e-5 where the people resolve them."""
    demographics: Annotated[Path | None, Argument("FILE.csv")] = None
    """Labels, identity,<attribute>[,…]: also measure each group."""
    flip: bool = False
    """Add each embedding to its mirror image's; no certificates then."""
    any_space: bool = False
    """Allow a student that was not distilled from the teacher (a control)."""
    synthetic: bool = False
    """The faces are procedural: say so in report and certificates."""
    bootstrap: int = EvaluationOptions.resamples
    """Resamples of the identities that the intervals come from."""
    seed: int = EvaluationOptions.seed
    """Seed of the resampling."""
    sign: Annotated[Path | None, Argument("KEY.pem")] = None
    """ed25519 private key: sign the certificates and report.json."""
    cache: Annotated[Path | None, Argument("DIR")] = None
    """Folder that keeps embeddings between runs, $PKD_CACHE or ~/.cache/pkd."""
    jobs: int | None = None
    """Threads; one per core by default."""
    out: Annotated[Path, Argument("EVAL")]
    """Folder for the report and the certificates."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateOptions:
        sides = [self.gallery, self.probe]
        if self.templates and (self.pairs or any(sides) or not self.faces):
            raise InputError(
                "--templates META takes its images from --faces DIR and goes with no --pairs or --gallery."
            )
        if self.templates and self.demographics:
            raise InputError("--demographics goes with --faces or --gallery and --probe. Drop it, or --templates.")
        if self.no_detector_score and not self.templates:
            raise InputError("--no-detector-score goes with --templates META. Drop it.")
        if self.protocol and (self.pairs or self.templates or any(sides) or self.demographics or not self.faces):
            raise InputError("--protocol NAME runs on --faces DIR, without other options that say what to compare.")
        if self.pairs and any(sides):
            raise InputError(
                "--pairs FILE takes its images from --faces DIR or holds them: drop --gallery and --probe."
            )
        if not self.pairs and self.threshold_pairs:
            raise InputError("--threshold-pairs goes with --pairs. Drop it, or pass --pairs FILE.")
        if not self.pairs and (bool(self.faces) == any(sides) or any(sides) != all(sides)):
            raise InputError("what to compare? Pass --faces DIR, or --gallery DIR and --probe DIR.")
        if bool(self.mapped) != bool(self.old) or (self.old_preprocess and not self.old):
            raise InputError("--mapped MAP.npz goes with --old SPEC, the encoder that it was fitted for. Give both.")
        if self.mapped and (self.pairs or self.templates or self.flip):
            raise InputError("--mapped goes with --faces, or --gallery and --probe, without --flip.")
        if self.fit_faces and not self.control:
            raise InputError(
                "--fit-faces goes with --control SPEC, the encoder that is mapped into the teacher's space."
            )
        if self.control_preprocess and not self.control:
            raise InputError("--control-preprocess states how --control scales pixels. Give --control, too.")
        if self.bootstrap < 100:
            raise InputError(f"--bootstrap {self.bootstrap}: a 95 % interval needs at least 100 resamples.")
        if self.jobs is not None and self.jobs < 1:
            raise InputError(f"--jobs {self.jobs}: give 1 or more.")
        if self.pairs and self.demographics:
            raise InputError("--demographics goes with --faces or --gallery and --probe. Drop it, or --pairs.")
        if self.pairs and self.fmr:
            raise InputError(
                "--fmr goes with --faces or --gallery and --probe: a pair list has too few impostor pairs."
            )
        if bad := [fmr for fmr in self.fmr if not 0 < fmr < 1]:
            raise InputError(f"--fmr {bad[0]:g}: a false match rate lies between 0 and 1.")
        return self


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-evaluate``; returns the exit code."""
    return run_command(
        "pkd-evaluate",
        "Compare every pair of a set of aligned faces (or of a gallery and a probe set, or of an official pair list) "
        "with the teacher on both sides, the student on both sides, and the student's query against the teacher's "
        "gallery. Writes EVAL/report.html, EVAL/report.json and one certificate per ordered pair of encoders.",
        EXAMPLES,
        EvaluateOptions,
        evaluate,
        argv,
    )


def evaluate(options: EvaluateOptions, console: Console) -> Result:
    """Run the protocol that is asked for and write its results; returns what ``--json`` prints."""
    key = SigningKey.read(options.sign) if options.sign else None
    require_plots()
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"{options.out}: is a file. Give a folder with --out.")
    result = _measure(options, ConsoleProgress(console))
    evaluation = result.evaluation
    _write(options.out, result, key)
    _show(console, evaluation, options.out)
    summary: dict[str, Any] = evaluation.model_dump(
        mode="json",
        exclude={
            "comparisons": {"__all__": {"det", "calibration", "genuine", "impostor"}},
            "agreement": {"histogram"},
            "identifications": {"__all__": {"curve"}},
        },
    )
    return {"out": str(options.out), **summary}


def _measure(asked: EvaluateOptions, progress: Progress) -> ProtocolResult:
    options = EvaluationOptions(
        fmrs=asked.fmr or None,
        flip=asked.flip,
        any_space=asked.any_space,
        synthetic=asked.synthetic,
        detector_score=not asked.no_detector_score,
        resamples=asked.bootstrap,
        seed=asked.seed,
        cache=asked.cache or default_cache(),
        jobs=asked.jobs,
    )

    def encoders(*evaluated: FaceSet | None) -> EncoderSet:
        return _open(asked, [faces for faces in evaluated if faces], options, progress)

    if asked.pairs:
        pairs = read_pairs(asked.pairs, asked.faces)
        threshold_pairs = read_pairs(asked.threshold_pairs, asked.faces) if asked.threshold_pairs else None
        return pair_list_accuracy(
            pairs,
            _name(asked.pairs) if asked.pairs.is_dir() else asked.pairs.name,
            encoders(pairs.faces, threshold_pairs.faces if threshold_pairs else None),
            options,
            progress,
            threshold_pairs=threshold_pairs,
            threshold_name=asked.threshold_pairs.name if asked.threshold_pairs else "",
        )
    if asked.templates and asked.faces:
        templates = read_templates(asked.templates, asked.faces, scored=options.detector_score)
        return template_matching(templates, _name(asked.templates), encoders(templates.faces), options, progress)
    if asked.protocol and asked.faces:
        measure, faces = find_protocol(asked.protocol), FaceSet.read(asked.faces)
        return measure(faces, _name(asked.faces), encoders(faces), options, progress)
    if asked.gallery and asked.probe:
        faces, probe = FaceSet.read(asked.gallery), FaceSet.read(asked.probe)
        name = f"{_name(asked.gallery)} (gallery), {_name(asked.probe)} (probe)"
    else:
        assert asked.faces is not None
        faces, probe, name = FaceSet.read(asked.faces), None, _name(asked.faces)
    labels = read_labels(asked.demographics) if asked.demographics else None
    if labels:
        labels = labels.matched(sorted({*faces.identities, *(probe.identities if probe else ())}))
    return cross_matrix(faces, name, encoders(faces, probe), options, progress, probe=probe, labels=labels)


def _open(
    asked: EvaluateOptions, evaluated: Sequence[FaceSet], options: EvaluationOptions, progress: Progress
) -> EncoderSet:
    """Open the encoders; with ``--fit-faces``, fit linear maps on these and not on ``evaluated``."""
    encoder_set = EncoderSet(
        teacher=open_encoder(asked.teacher, asked.teacher_preprocess),
        student=open_encoder(asked.student) if asked.student else None,
        control=open_encoder(asked.control, asked.control_preprocess, option="--control-preprocess")
        if asked.control
        else None,
    )
    if asked.mapped and asked.old:
        encoder_set = replace(encoder_set, mapped=_mapped(asked.mapped, asked.old, asked.old_preprocess, evaluated))
    require_control(encoder_set)
    require_unseen(encoder_set, evaluated, options)
    encoder_set = replace(encoder_set, warnings=tuple(_warnings(asked, encoder_set.teacher, evaluated, options)))
    if not asked.fit_faces:
        return encoder_set
    return with_maps(encoder_set, FaceSet.read(asked.fit_faces), _name(asked.fit_faces), evaluated, options, progress)


def _warnings(
    asked: EvaluateOptions, teacher: Encoder, evaluated: Sequence[FaceSet], options: EvaluationOptions
) -> Iterator[str]:
    """Say what makes the figures to come worth less: a doubtful scaling, faces that the student was trained on."""
    if evaluated and (doubt := check_preprocessing(teacher, evaluated[0], reopener(asked.teacher))):
        yield doubt
    run = Path(asked.student) if asked.student else None
    for faces in evaluated if run else ():
        assert run is not None
        images, people = seen_in(run if run.is_dir() else run.parent, faces, options.cache)
        if images or people:
            yield (
                f"The student was trained on {images:,} of these {len(faces):,} images, and on {people:,} of the "
                f"{len(faces.identities):,} people by their names: its rates are better than on people whom it does "
                "not know. Leave them out."
            )


def _mapped(file: Path, old: str, preprocess: str | None, evaluated: Sequence[FaceSet]) -> Encoder:
    """Open an old encoder behind its map. Raises InputError where the map was fitted on these very images."""
    found = SpaceMap.read(file)
    if found.report.data_digest in {faces.digest() for faces in evaluated}:
        raise InputError(f"{file}: it was fitted on these very images. Certify it on other people.")
    return found.encoder(open_encoder(old, preprocess, option="--old-preprocess"))


def _name(source: Path) -> str:
    return "/".join(source.resolve().parts[-2:])


def _write(out: Path, result: ProtocolResult, key: SigningKey | None) -> None:
    """Write everything, then put it in place: an earlier run's certificates or draws would pass for this run's."""
    with replaced(out, RESULTS) as new:
        (new / "certificates").mkdir()
        for certificate in result.certificates:
            data = (certificate.model_dump_json(indent=2) + "\n").encode()
            write_signed(new / "certificates" / certificate.file_name, data, key)
        write_resample_values(new, result.resample_values)
        write_signed(new / "report.json", (result.evaluation.model_dump_json(indent=2) + "\n").encode(), key)
        (new / "report.html").write_text(render(result.evaluation, new / "figures"), encoding="utf-8")
        if worst := render_worst(result.evaluation):
            (new / "worst.html").write_text(worst, encoding="utf-8")
    (out / "certificates").mkdir(exist_ok=True)


def _show(console: Console, evaluation: Evaluation, out: Path) -> None:
    if evaluation.synthetic:
        console.print("[bold]Synthetic faces: these rates say nothing about people.[/bold]")
    if evaluation.comparisons:
        show_table(console, _matrix(evaluation))
    for cost in evaluation.costs:
        low, high = cost.difference.ci95
        console.print(
            f"mapped templates cost {cost.pair} at FMR {cost.fmr:g}: {100 * cost.difference.difference:+.1f} points of "
            f"TAR ({100 * low:+.1f} to {100 * high:+.1f}); {100 * cost.mapped_tar_balanced:.1f} % instead of "
            f"{100 * cost.native_tar_balanced:.1f} %"
        )
    if evaluation.identifications:
        show_table(console, identification_table(evaluation))
    for line in verdicts(evaluation):
        console.print(line, style="bold red", markup=False)
    for found in evaluation.pair_accuracies:
        folds = found.fold_std
        deviation = f" ± {100 * folds:.2f} (standard deviation over folds)" if folds is not None else ""
        console.print(
            f"{found.name}  accuracy {100 * found.accuracy:.2f}{deviation}, 95 % interval {_percents(found.ci95)}; "
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
        console.print(note, markup=False, soft_wrap=True)
    for refusal in evaluation.comparisons[0].refused[:1] if evaluation.comparisons else ():
        console.print(refusal.reason)  # the report gives all of them
    console.print(f"report: {out / 'report.html'}")


def _matrix(evaluation: Evaluation) -> Table:
    table = Table(title="True accept rate, % with 95 % interval; query–gallery", title_justify="left")
    for heading in ("pair", "FMR", "macro (balanced)", "micro (raw)", "threshold"):
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


def identification_table(evaluation: Evaluation) -> Table:
    """Tabulate one row an encoder pair: mates found first, and missed at each false positive identification rate.

    Every identity weighs the same; the report has the raw rates, the other ranks and the thresholds.
    """
    first = evaluation.identifications[0]
    table = Table(
        title=f"Search among {' and '.join(f'{n:,}' for n in first.enrolled)} people, macro (balanced), % with 95 % "
        "interval; probe–gallery",
        title_justify="left",
    )
    table.add_column("pair", no_wrap=True)
    for heading in (*(f"rank {p.rank}" for p in first.ranks[:1]), *(f"FNIR@FPIR {p.fpir:g}" for p in first.points)):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in evaluation.identifications:
        mates = [_said(point.rate_balanced, point.rate_balanced_ci95) for point in found.ranks[:1]]
        misses = [_said(miss.fnir_balanced, miss.fnir_balanced_ci95) for miss in found.points]
        table.add_row(found.name, *mates, *misses)
    return table


def _said(rate: float, interval: Interval) -> str:
    return f"{100 * rate:.1f} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"


def read_pairs(source: Path, faces: Path | None) -> PairList:
    """Read a pair list of any of the three layouts. ``faces``: the folder of its crops; a ``.bin`` holds its own.

    Raises InputError naming the file, the line or the missing images.
    """
    try:
        packed = not source.is_dir() and looks_pickled(source)
    except OSError as error:
        raise InputError(
            f"{source}: {error.strerror}. Give LFW's pairs.txt, CFP's Protocol/Split/FP or a .bin."
        ) from None
    if packed:
        if faces:
            raise InputError(f"{source}: holds its own images. Drop --faces {faces}.")
        return read_bin(source)
    if faces is None:
        raise InputError(
            f"{source}: names images that it does not hold. Pass the folder of its crops with --faces DIR."
        )
    return read_cfp(source, faces) if source.is_dir() else read_lfw(source, faces)
