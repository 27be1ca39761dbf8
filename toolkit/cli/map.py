"""Run pkd-map: fit the map that takes the templates of an old encoder into a new teacher's space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import model_validator
from rich.console import Console

from pkd.toolkit.core.cli_options import Argument, Options, run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.embed import default_cache, embed_faces
from pkd.toolkit.encoders.space_map import fit_space_map

EXAMPLES = """
  pkd-map --old old-bundle --new new-bundle --faces crops/ --out old-to-new.npz
  pkd-map --old old.onnx --old-preprocess mean=0,std=1 --new new.onnx --new-preprocess mean=127.5,std=127.5 \\
      --faces crops.tar more.txt --unlabelled --out old-to-new.npz
  pkd-evaluate --teacher new-bundle --student student-bundle --mapped old-to-new.npz --old old-bundle \\
      --faces others/ --out evaluation
  pkd-gallery migrate galleries staff --map old-to-new.npz --evaluation evaluation --master-key master.key
"""


class MapOptions(Options):
    """Hold what pkd-map was asked for."""

    old: Annotated[str, Argument("SPEC")]
    """Encoder that made the templates: bundle, run, FILE.onnx, FILE.pt or insightface:PACK."""
    old_preprocess: Annotated[str | None, Argument("P")] = None
    """Pixel scaling of an --old that is FILE.onnx or FILE.pt, for example mean=127.5,std=127.5."""
    new: Annotated[str, Argument("SPEC")]
    """Teacher whose space the templates are mapped into."""
    new_preprocess: Annotated[str | None, Argument("P")] = None
    """Pixel scaling of a --new that is FILE.onnx or FILE.pt."""
    faces: Annotated[tuple[Path, ...], Argument("DIR|LIST")]
    """Aligned crops of anybody: folders, lists, .rec or .tar. Those of people you certify on must not be among them."""
    unlabelled: bool = False
    """The crops lie in no folder per identity."""
    seed: int = 0
    """Seed that draws whom to hold out."""
    cache: Annotated[Path | None, Argument("DIR")] = None
    """Folder that keeps embeddings between runs, $PKD_CACHE or ~/.cache/pkd."""
    jobs: int | None = None
    """Threads; one per core by default."""
    out: Annotated[Path, Argument("MAP.npz")]
    """File to write."""

    @model_validator(mode="after")
    def _check(self) -> MapOptions:
        if self.jobs is not None and self.jobs < 1:
            raise InputError(f"--jobs {self.jobs}: give 1 or more.")
        if self.out.suffix != ".npz" or self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise InputError(f"--out {self.out}: give the name of a .npz file in a folder that is there.")
        return self


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-map``; returns the exit code."""
    return run_command(
        "pkd-map",
        "Fit the linear map that takes the templates of an old encoder into the space of a new teacher, from faces of "
        "anybody, so that galleries outlive their teacher without new photographs.",
        EXAMPLES,
        MapOptions,
        fit,
        argv,
    )


def fit(options: MapOptions, console: Console) -> Result:
    """Embed the faces with both encoders, fit the map and write it; returns what ``--json`` prints."""
    encoders = (
        open_encoder(options.old, options.old_preprocess, option="--old-preprocess"),
        open_encoder(options.new, options.new_preprocess, option="--new-preprocess"),
    )
    faces = FaceSet.read(*options.faces, labelled=not options.unlabelled)
    progress, cache = ConsoleProgress(console), options.cache or default_cache()
    rows = []
    for encoder in encoders:
        with progress(f"embedding with {encoder.info.name}", len(faces)) as advance:
            rows.append(embed_faces(encoder, faces, cache=cache, jobs=options.jobs, advance=advance))
    name = ", ".join("/".join(source.resolve().parts[-2:]) for source in options.faces)
    old, new = (encoder.info for encoder in encoders)
    made = fit_space_map(
        old, new, rows[0], rows[1], faces.labels, data=name, data_digest=faces.digest(), seed=options.seed
    )  # fmt: skip
    made.write(options.out)
    report = made.report
    console.print(
        f"{short(made.info.id)}: {report.kind} from {report.images:,} images. Mean cosine of a mapped template to the "
        f"native one, on {report.held_out_images:,} images of {report.held_out_by} held out: "
        f"{report.held_out_cosine:.3f}.\nwrote {options.out}. Certify it next: pkd-evaluate --mapped {options.out}",
        markup=False,
        soft_wrap=True,
    )
    return {"out": str(options.out), "encoder": made.info.id, "old": old.id, "new": new.id, **report.model_dump()}
