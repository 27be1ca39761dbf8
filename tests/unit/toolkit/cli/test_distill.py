"""Bad input to pkd-distill: one line that names value and remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.cli.distill import main
from tests.support.training_data import SIZE, write_patterns, write_teacher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_patterns(folder / "crops")
    write_patterns(folder / "corrupt")
    (folder / "corrupt" / "id-01" / "3.png").write_bytes(b"\x89PNG garbage")
    write_patterns(folder / "large", size=64)
    (folder / "empty").mkdir()
    write_teacher(folder / "teacher.onnx")
    random = np.random.default_rng(0)
    centres = random.normal(size=(6, 16)).astype(np.float32)
    np.savez(folder / "zero.npz", centres=np.vstack([centres[:5], np.zeros((1, 16), np.float32)]))
    np.savez(folder / "wide.npz", centres=random.normal(size=(6, 17)))
    np.savez(folder / "random.npz", centres=centres)
    return folder


def options(place: Path, *more: str) -> list[str]:
    base = {
        "--teacher": str(place / "teacher.onnx"),
        "--teacher-preprocess": f"mean=127.5,std=127.5,size={SIZE},template=none",
        "--faces": str(place / "crops"), "--student": "mobilefacenet-relu:0.125", "--steps": "2", "--batch": "8",
        "--precision": "fp32", "--threads": "1", "--cache": str(place / "cache"), "--out": str(place / "run"),
    }  # fmt: skip
    pairs = dict(zip(more[::2], more[1::2], strict=True))
    merged = base | {k: str(place / v) if (place / v).exists() else v for k, v in pairs.items()}
    return [part for option, value in merged.items() if value != "-" for part in (option, value)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--faces", "nowhere"), "nowhere: no such folder or list file"),
        (("--faces", "empty"), "holds no image"),
        (("--faces", "crops/id-00"), "have no identity"),
        (("--faces", "corrupt"), "id-01/3.png"),
        (("--faces", "large"), "64×64 pixels, expected an aligned 32×32 crop"),
        (("--teacher", "nowhere.onnx"), "nowhere.onnx: no such file"),
        (("--teacher", "crops/id-00/0.png"), "not an encoder"),
        (("--teacher", "-"), "needs --teacher"),
        (("--teacher-preprocess", "-"), "preprocessing is not stated"),
        (("--teacher-preprocess", "mean=a"), "preprocessing"),
        (("--teacher-preprocess", "mean=0,size=48"), "48"),
        (("--head", "zero.npz"), "first: row 5, id-05"),
        (("--head", "wide.npz"), "the teacher's space has 16 dimensions"),
        (("--head", "random.npz"), "nearest to their own centre"),
        (("--head", "nowhere.npz"), "nowhere.npz"),
        (("--head", "empty"), "empty: holds none of head.npz, checkpoint_gpu_*.pt"),
        (("--head", "images:2"), "--head images:2: the share"),
        (("--head", "zero.npz", "--head-labels", "crops"), "crops: Is a directory"),
        (("--merge-duplicates", "70"), "--merge-duplicates 70.0: a cosine between 0 and 1"),
        (("--teacher", "-", "--method", "none", "--merge-duplicates", "0.7"), "needs --teacher"),
        (("--method", "magic"), "unknown method 'magic'"),
        (("--margin", "arcface:9"), "--margin"),
        (("--student", "vgg"), "unknown backbone"),
        (("--batch", "31"), "fewer than --batch 31"),
        (("--steps", "0"), "--steps 0"),
        (("--dim", "8"), "--dim 8"),
        (("--name", "a/b"), "a/b"),
    ],
)
def test_one_line(place: Path, more: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(options(place, *more)) == 2
    shown = capfd.readouterr()
    line = shown.err.strip().splitlines()[-1]
    assert line.startswith("pkd-distill: ") and message in line
    assert "Traceback" not in shown.err and not shown.out
    assert not (place / "run" / "student.pt").exists()


def test_nothing_to_resume(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "--out", str(place / "never")]) == 2
    assert "nothing to resume" in capfd.readouterr().err


def test_help_states_every_default(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capfd.readouterr().out.split())
    assert "[l2kd]" in text and "[arcface:0.5]" in text and "--max-minutes" in text and "examples:" in text


def test_duplicates_are_printed_then_merged(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    crops = write_patterns(place / "twice", images=6)
    (crops / "again").mkdir()
    for k in (3, 4, 5):
        (crops / "id-02" / f"{k}.png").rename(crops / "again" / f"{k}.png")

    def shown(*more: str) -> str:
        assert main(options(place, "--faces", "twice", "--head", "fit", *more)) == 0
        return " ".join(capfd.readouterr().err.replace("│", " ").split())

    assert "1: probably the same, --merge-duplicates 0.7 merges them" in shown("--out", str(place / "apart"))
    text = shown("--out", str(place / "merged"), "--merge-duplicates", "0.7")
    assert "1: 1 classes merged into 1; 0 pairs left apart" in text and "alike: again, id-02" in text
    (group,) = json.loads((place / "merged" / "audit.json").read_text())["merged"]
    assert {group["identity"], *group["others"]} == {"again", "id-02"} and group["images"] == 6
    assert len(np.load(place / "merged" / "head.npz")["centres"]) == 6
    assert json.loads((place / "merged" / "config.json").read_text())["merge_duplicates"] == 0.7
