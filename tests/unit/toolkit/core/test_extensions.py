"""MODULE:NAME from the command line: found in the working directory, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.extensions import load_object


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # and is forgotten after the test
    (tmp_path / "own_loss_of_test.py").write_text("def loss(): return 7\n")
    (tmp_path / "broken_of_test.py").write_text("raise ValueError('a\\nb')\n")
    return tmp_path


@pytest.mark.usefixtures("working_directory")
def test_an_object_of_a_module_in_the_working_directory_is_found() -> None:
    assert load_object("own_loss_of_test:loss", "--method", "a, b")() == 7


@pytest.mark.usefixtures("working_directory")
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("l3kd", "--method l3kd: unknown. Choose of a, b, or name one of your own as MODULE:NAME."),
        ("own loss:x", "unknown. Choose of a, b"),
        ("own_loss_of_test:", "unknown. Choose of a, b"),
        ("own_loss_of_test:lost", "has no lost"),
        ("absent_of_test:x", "absent_of_test cannot be imported (ModuleNotFoundError: No module named"),
        ("broken_of_test:x", "broken_of_test cannot be imported (ValueError: a b)"),
    ],
)
def test_what_cannot_be_found_is_refused_in_one_line(spec: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        load_object(spec, "--method", "a, b")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
