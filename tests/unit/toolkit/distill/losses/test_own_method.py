"""Losses of somebody's own: named by module on the command line, alone or in a sum, with no file of pkd touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from pkd.toolkit.cli.distill import main
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.losses.embedding import l2kd
from pkd.toolkit.distill.losses.registry import WeightedSum
from tests.support.loss_inputs import make_inputs
from tests.support.training_data import SIZE, write_patterns, write_teacher

DOCUMENT = Path(__file__).parents[5] / "docs" / "distillation.md"
BROKEN = """
import math
from torch import Tensor
VALUE = 3

def pair(inputs, other): ...
def vector(inputs): return inputs.embeddings.sum(dim=1)
def number(inputs): return 1.0
def detached(inputs): return inputs.embeddings.detach().sum()
def diverges(inputs): return inputs.embeddings.sum() * math.nan
def fails(inputs): return inputs.embedings
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with the module that the documentation shows, and one full of mistakes."""
    shown = re.search(r"```python\n# (my_losses)\.py\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    name = f"{shown[1]}_{tmp_path.name.replace('-', '_')}"  # a module is imported once per process
    (tmp_path / f"{name}.py").write_text(shown[2], encoding="utf-8")
    (tmp_path / "broken_losses.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def module_of(folder: Path) -> str:
    return next(folder.glob("my_losses_*.py")).stem


def test_the_documented_method_in_a_sum_equals_its_parts(folder: Path) -> None:
    inputs = make_inputs([0, 1, 2], dtype=torch.float64)
    own = WeightedSum.parse(f"l2kd+{module_of(folder)}:hardest:0.5")
    alone = WeightedSum.parse(f"{module_of(folder)}:hardest")
    assert float(own.loss(inputs)) == pytest.approx(float(l2kd(inputs)) + 0.5 * float(alone.loss(inputs)), rel=1e-12)
    assert alone.aligns and alone.needs_teacher and not alone.needs_labels and alone.head == "none"
    assert str(own) == f"l2kd+{module_of(folder)}:hardest:0.5" and WeightedSum.parse(str(own)) == own


def test_a_run_by_the_command_with_a_loss_from_outside(folder: Path) -> None:
    write_patterns(folder / "faces")
    write_teacher(folder / "teacher.onnx")
    method = f"l2kd+{module_of(folder)}:hardest:0.5"
    preprocess = f"channels=rgb,size={SIZE},mean=127.5,std=127.5,template=none"
    options = [
        "--faces", "faces", "--teacher", "teacher.onnx", "--teacher-preprocess", preprocess, "--method", method,
        "--student", "mobilefacenet-relu:0.125", "--steps", "3", "--batch", "8", "--precision", "fp32",
        "--threads", "1", "--cache", "cache", "--out", "run",
    ]  # fmt: skip
    assert main(options) == 0
    assert json.loads((folder / "run" / "config.json").read_text())["method"] == method


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nowhere_to_be_found:loss", "nowhere_to_be_found cannot be imported .*PYTHONPATH"),
        ("broken_losses.inner:loss", "broken_losses.inner cannot be imported"),
        ("broken_losses:missing", "broken_losses.py has no missing"),
        ("broken_losses:VALUE", "is of type int, not a function"),
        ("broken_losses:pair", r"takes other arguments than one.*def pair\(inputs"),
        ("broken_losses:vector:x", "weight 'x' is not a positive number"),
        ("broken_losses:0.5", "unknown method 'broken_losses'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_a_loss_is_refused_before_any_work(method: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WeightedSum.parse(method)


@pytest.mark.parametrize(("name", "message"), [("vector", r"shape \(3,\)"), ("number", "float"), ("detached", r"\(\)")])
@pytest.mark.usefixtures("folder")
def test_what_is_no_scalar_with_a_gradient_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"broken_losses:{name}: returned .*{message}"):
        WeightedSum.parse(f"broken_losses:{name}").loss(make_inputs([0, 1, 2], requires_grad=True))


@pytest.mark.usefixtures("folder")
def test_a_loss_that_is_not_finite_is_named_and_other_mistakes_keep_their_traceback() -> None:
    inputs = make_inputs([0, 1, 2], requires_grad=True)
    assert WeightedSum.parse("l2kd+broken_losses:diverges").not_finite(inputs) == ("broken_losses:diverges",)
    with pytest.raises(AttributeError, match="embedings"):
        WeightedSum.parse("broken_losses:fails").loss(inputs)
