"""Rules of galleries: read from a file, read again, and never loosened by a broken one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pkd.serving.matching.policies import Policies
from pkd.toolkit.core.errors import InputError


def test_a_gallery_has_its_own_rules_or_those_of_all_others(tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    path.write_text(json.dumps({"staff": {"quality": {"yaw": 30}}, "*": {"quality": {"yaw": 45}}}))
    policies = Policies(path)
    assert (policies.of("staff").quality.yaw, policies.of("visitors").quality.yaw) == (30, 45)
    assert Policies().of("staff").quality.yaw == 180


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(tmp_path: Path) -> None:
    path, now = tmp_path / "policies.json", [0.0]
    path.write_text('{"staff": {"quality": {"yaw": 30}}}')
    policies = Policies(path, clock=lambda: now[0])
    for text, expected in (('{"staff": {"quality": {"yaw": 20}}}', 20), ('{"staff": {}', 20), ("{}", 180)):
        path.write_text(text)
        os.utime(path, ns=(len(text), len(text)))
        now[0] += 2
        assert policies.of("staff").quality.yaw == expected
    path.unlink()
    now[0] += 2
    assert policies.of("staff").quality.yaw == 180  # as it was read last


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "not an object"),
        ('{"staff": {"quality": {"jaw": 30}}}', r"staff\.quality\.jaw: Extra inputs"),
        ('{"staff": {"quality": {"yaw": true}}}', r"staff\.quality\.yaw"),
        ('{"staff": {"quality": {"yaw": 999}}}', r"staff\.quality\.yaw"),
        ('{"../x": {}}', "String should match"),
        ('{"staff": {}, "staff": {}}', "'staff' twice in one object"),
        ("{", "Expecting"),
    ],
)
def test_a_bad_file_is_refused_at_the_start(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "policies.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        Policies(path)
    with pytest.raises(InputError, match="No such file"):
        Policies(tmp_path / "nowhere")
