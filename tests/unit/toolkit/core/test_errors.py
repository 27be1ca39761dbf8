"""The tree of errors is the documented one."""

from __future__ import annotations

import inspect
import pickle
import re
from types import ModuleType

import pytest

from pkd.toolkit.core import errors


def drawn(module: ModuleType) -> dict[str, tuple[str | None, int]]:
    """Name → (parent, exit code) as drawn in the tree of a module's docstring."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str, int]] = []
    for line in (module.__doc__ or "").splitlines():
        found = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(?: +(\d)(?= ))?", line)
        if not found:
            continue
        depth = len(found[1])
        while above and above[-1][0] >= depth:
            above.pop()
        parent = above[-1][1] if above else None
        code = int(found[3]) if found[3] else above[-1][2]  # a leaf without a number has its parent's
        tree[found[2]] = (parent, code)
        above.append((depth, found[2], code))
    return tree


def test_the_drawn_tree_is_the_tree() -> None:
    classes = [cls for cls in vars(errors).values() if inspect.isclass(cls) and cls.__module__ == errors.__name__]
    real = {
        cls.__name__: (cls.__base__.__name__ if cls.__base__ in classes else None, cls.exit_code)  # type: ignore[attr-defined]
        for cls in classes  # type: ignore[attr-defined]
    }
    assert drawn(errors) == real
    assert len(real) > 10


def test_details_are_added_and_never_replaced() -> None:
    error = errors.InputError("no", details={"got": 1})
    assert error.explain(got=2, works=3) is error
    assert error.details == {"got": 1, "works": 3}
    copied = pickle.loads(pickle.dumps(error))  # as it crosses from one process to another
    assert (str(copied), copied.details) == ("no", error.details)


def test_a_missing_extra_says_what_to_install() -> None:
    assert str(errors.MissingExtra("torch", "train")) == (
        "torch is not installed. Install it with: pip install 'pkd[train]'"
    )


FOREIGN = {
    "Exception from src/inference/src/cpp/core.cpp:105:\nCheck 'false' failed at src/frontends/report.cpp:151:\n"
    "FrontEnd API failed with OpConversionFailure:\nModel wasn't fully converted.\nSummary:\n"
    "-- No conversion rule found for operations: my.Nope\nTo facilitate the conversion of unsupported operations, "
    "refer to Frontend Extension documentation: https://docs.openvino.ai/latest/x.html \n\n": (
        "No conversion rule found for operations: my.Nope."
    ),
    "Exception from src/inference/src/cpp/infer_request.cpp:224:\nException from src/plugins/node.cpp:794:\n"
    "[CPU] Reshape node with name 'y' Check 'minusOneCount <= 1' failed at src/plugins/reshape.cpp:77:\n"
    "[cpu]reshape: the shape of input data (2.3) conflicts with the reshape pattern (-1.5)\n": (
        "reshape: the shape of input data (2.3) conflicts with the reshape pattern (-1.5)."
    ),
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'' Status Message: "
    "/onnxruntime_src/onnxruntime/core/reshape_helper.h:84 onnxruntime::ReshapeHelper::ReshapeHelper(const X&)": (
        "Non-zero status code returned while running Reshape node. Name:''."
    ),
    "Exception from src/inference/src/cpp/core.cpp:117:\n": "RuntimeError.",
    "mat1 and mat2 shapes cannot be multiplied": "mat1 and mat2 shapes cannot be multiplied.",
    "x" * 400: "x" * 300 + ".",
}


@pytest.mark.parametrize("said", FOREIGN)
def test_what_a_runtime_throws_becomes_one_sentence_without_code(said: str) -> None:
    assert errors.plain_reason(RuntimeError(said)) == FOREIGN[said]


def test_a_missing_key_is_said_in_a_sentence() -> None:
    assert errors.plain_reason(KeyError("pooled")) == "'pooled' is missing."
