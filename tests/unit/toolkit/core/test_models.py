"""JSON that is read back: no key twice, and no number that other programs could not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pkd.serving.api.oidc import Oidc
from pkd.serving.core.signed_tokens import KeySet
from pkd.serving.matching.liveness import Liveness
from pkd.serving.matching.policies import Policies
from pkd.toolkit.certificates.attack_detection import read_attack_certificate
from pkd.toolkit.certificates.certificate import read_certificate
from pkd.toolkit.core.errors import BundleError, InputError
from pkd.toolkit.core.models import MOST, read_json

READERS: dict[str, Callable[[Path], object]] = {
    "policies": Policies,
    "liveness": Liveness.read,
    "oidc": Oidc.read,
    "jwks": lambda path: KeySet(str(path)),
    "certificate": read_certificate,
    "attack certificate": read_attack_certificate,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {"b": 1, "b": 2}}', "has 'b' twice in one object"),
        ('{"a": {"seed": 1' + 400 * "0" + "}}", "seed: a number of more than 64 bits"),
        ('{"a": [1, -9223372036854775809]}', "a: a number of more than 64 bits"),
    ],
)
def test_every_file_of_a_server_is_read_alike(reader: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        READERS[reader](path)


@pytest.mark.parametrize("number", [MOST - 1, -MOST])
def test_numbers_of_64_bits_are_read(number: int) -> None:
    assert read_json(f'{{"a": {number}, "b": [{number}]}}', "file") == {"a": number, "b": [number]}


def test_a_larger_one_is_not() -> None:
    with pytest.raises(BundleError, match="a: a number"):
        read_json(f'{{"a": {MOST}}}', "file")
