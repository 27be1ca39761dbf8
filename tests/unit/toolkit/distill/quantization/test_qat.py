"""What a run must still have so that its student can be trained on for INT8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.quantization.qat import LR_FACTOR, read_config
from tests.support.training_data import write_patterns, write_teacher


@pytest.fixture
def choices(tmp_path: Path) -> dict[str, Any]:
    write_teacher(tmp_path / "t.onnx")
    faces = write_patterns(tmp_path / "faces", 2, 2)
    (tmp_path / "run").mkdir()
    return {"out": "r", "faces": (str(faces),), "teacher": str(tmp_path / "t.onnx"), "lr": 0.5, "max_minutes": 1.0}


def write(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "run" / "config.json").write_text(DistillConfig(**config).model_dump_json())
    return tmp_path / "run"


def test_the_run_goes_on_as_it_was_for_other_steps(tmp_path: Path, choices: dict[str, Any]) -> None:
    run = write(tmp_path, {**choices, "method": "l2kd", "unlabelled": (str(tmp_path / "faces"),)})
    config = read_config(run / "student.pt", None, 7)
    assert (config.method, config.faces, config.steps, config.max_minutes) == ("l2kd", choices["faces"], 7, None)
    assert config.lr == pytest.approx(LR_FACTOR * 0.5) and config.precision == "fp32"
    other = write_patterns(tmp_path / "other", 2, 2)
    config = read_config(run, other, 7)
    assert (config.faces, config.unlabelled) == ((str(other),), ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"faces": ("gone",)}, "gone. Pass --qat-faces DIR or LIST."),
        ({"unlabelled": ("gone",)}, "gone. Pass --qat-faces DIR or LIST."),
        ({"teacher": "gone.onnx"}, "gone.onnx, the teacher of"),
        ({"method": "none"}, "--method none, which leaves it outside its teacher's space"),
        ({"teacher": None, "method": "none"}, "--method none, which leaves it outside its teacher's space"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, choices: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_config(write(tmp_path, {**choices, **changes}), None, 7)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_config(tmp_path, None, 7)
