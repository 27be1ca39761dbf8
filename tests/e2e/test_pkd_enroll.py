"""pkd-enroll and the client against pkd-serve, as processes, with keys: from a folder of photographs to a search."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pkd.serving.api.api_keys import new_key
from pkd.serving.cli.enroll import main
from pkd.serving.client import Client, Embedding, Refused
from tests.support import gallery_fixtures as made
from tests.support.server_process import serving, with_gallery

SERVE = str(Path(sys.executable).parent / "pkd-serve")
ZOE = "Zoe-Muller-d6e575a6"
ENROLL = [sys.executable, "-m", "pkd.serving.cli.enroll"]


@contextmanager
def guarded(folder: Path, bundles: Any, *options: Any) -> Iterator[Any]:
    """pkd-serve with a gallery and two keys; yields its URL and the keys: everything, and enrol alone."""
    keys = [new_key("operator", "embed,verify,enrol,delete,admin"), new_key("intake", "enrol")]
    (folder / "keys.txt").write_text("\n".join(one["line"] for one in keys) + "\n")
    options = ("--api-keys", folder / "keys.txt", "--threads", 2, *with_gallery(folder), *options)
    with serving(*bundles, *options) as server:
        yield server.url, *(one["key"] for one in keys)
        server.stop()


def enroll(folder: Path, url: Any, key: Any, *options: Any) -> Any:
    command = [*ENROLL, folder, "--server", url, "--gallery", "staff", "--failed", folder.parent / "failed.csv"]
    command += ["--names", folder.parent / "names.csv"]
    environment = {**os.environ, "PKD_API_KEY": key}
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True, timeout=60, env=environment)
    assert "Traceback" not in done.stderr and key not in done.stderr
    written = folder.parent / "failed.csv"
    return done, list(csv.DictReader(written.read_text().splitlines())) if written.exists() else []


def test_from_a_folder_to_a_search(tmp_path: Path) -> None:
    fleet = made.fleet(tmp_path / "bundles")
    people = tmp_path / "people"
    for index, name in enumerate(("ann", "bob", "eve")):
        (people / name).mkdir(parents=True)
        (people / name / "1.png").write_bytes(made.made.png(made.CROPS[index]))
    with guarded(tmp_path, fleet.folders[:3], "--enrol-sharpness", "0") as (url, operator, intake):
        done, failed = enroll(people, url, intake, "--aligned", "--create", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["enrolled"] == 3 and failed == []

        (people / "ann" / "2.png").write_bytes(made.made.png(made.CROPS[3]))
        (people / "ann" / "notes.txt").write_text("no image")
        (people / "ann" / "broken.jpg").write_bytes(b"no image")
        (people / "stray.png").write_bytes(b"x")
        done, failed = enroll(people, url, intake, "--aligned", "--json")
        counts = json.loads(done.stdout)
        assert (done.returncode, counts["enrolled"], counts["already_enrolled"], counts["refused"]) == (0, 1, 3, 3)
        assert {(one["file"], one["type"]) for one in failed} == {
            ("ann/broken.jpg", "bad-image"), ("ann/notes.txt", "no-image"), ("stray.png", "no-subject"),
        }  # fmt: skip

        (people / "Zoë Müller").mkdir()
        (people / "Zoë Müller" / "1.png").write_bytes(made.made.png(made.CROPS[4]))
        (people / "nobody").mkdir()
        (people / "nobody" / "1.png").write_bytes(b"no image")
        done, failed = enroll(people, url, intake, "--aligned")
        assert done.returncode == 1 and "1 of 5 subjects" in done.stderr.strip().splitlines()[-1]
        assert ("nobody/1.png", "bad-image") in {(one["file"], one["type"]) for one in failed}
        assert dict(csv.reader((tmp_path / "names.csv").read_text("utf-8").splitlines()))[ZOE] == "Zoë Müller"

        with Client(url, operator) as client:
            assert client.gallery("staff").templates == {fleet.teacher.info.id: 5}
            assert client.identify("staff", made_query(fleet, 4), target_fpir=0.1).candidates[0].subject == ZOE
            for index, name in enumerate(("ann", "bob", "eve")):
                found = client.identify("staff", made_query(fleet, index), target_fpir=0.1)
                assert (found.decision, found.candidates[0].subject) == ("match", name)
            receipt = client.delete_subject("staff", "bob")
        with Client(url, intake) as limited:
            assert limited.gallery("staff").space.id == fleet.teacher.info.space.id
            for forbidden in (limited.galleries, lambda: limited.delete_subject("staff", "ann")):
                with pytest.raises(Refused) as refused:
                    forbidden()
                assert refused.value.type == "forbidden"

    with guarded(tmp_path, fleet.folders[:3]) as (url, operator, _), Client(url, operator) as client:
        assert list(client.subjects("staff")) == [ZOE, "ann", "eve"], "durable over a restart"
        assert client.delete_subject("staff", "eve").sequence > receipt.sequence


def test_everybody_is_sent_again_into_the_second_space_of_a_migration(tmp_path: Path) -> None:
    fleet = made.fleet(tmp_path / "bundles")
    people = tmp_path / "people"
    for index, name in enumerate(("ann", "bob")):
        (people / name).mkdir(parents=True)
        (people / name / "1.png").write_bytes(made.made.png(made.CROPS[index]))
    with guarded(tmp_path, [fleet.folders[0], fleet.folders[-1]], "--enrol-sharpness", "0") as (url, operator, intake):
        done, _ = enroll(people, url, intake, "--aligned")
        assert done.returncode == 2 and "Pass --create" in done.stderr.strip().splitlines()[-1]
        done, _ = enroll(people, url, intake, "--aligned", "--create", "--retention-days", "30", "--json")
        assert json.loads(done.stdout)["enrolled"] == 2, done.stderr
        with Client(url, operator) as client:
            assert client.gallery("staff").retention_seconds == 30 * 86_400
            client.begin_migration("staff", fleet.following.info.space.id)
            for enrolled, before in ((2, 0), (0, 2)):
                done, _ = enroll(people, url, intake, "--aligned", "--json")
                counts = json.loads(done.stdout)
                assert (counts["enrolled"], counts["already_enrolled"]) == (enrolled, before)
            assert client.migration("staff").moved == 2
            client.finish_migration("staff")
        done, _ = enroll(people, url, intake, "--aligned", "--json")
        assert json.loads(done.stdout)["already_enrolled"] == 2


def made_query(fleet: made.Fleet, index: int) -> Any:
    """As a device with the second student sends it."""
    return Embedding(fleet.second.embed(made.CROPS[index : index + 1])[0], fleet.second.info.id)


def test_what_cannot_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    people = tmp_path / "people"
    (people / "ann").mkdir(parents=True)
    (people / "ann" / "1.png").write_bytes(b"x")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    for folder, options, code, said in (
        (tmp_path / "nowhere", (), 2, "no such folder"),
        (tmp_path / "empty", (), 2, "holds no folder with images"),
        (people, ("--jobs", "0"), 2, "--jobs 0"),
        (people, ("--retention-days", "9"), 2, "Pass --create"),
        (people, ("--options", "[1]"), 2, "--options"),
        (people, ("--api-key-file", str(tmp_path / "none")), 2, "cannot be read"),
        (people, (), 1, "Is pkd-serve running there?"),
        (people, ("--server", "nonsense"), 1, "Is pkd-serve running there?"),
    ):
        assert main([str(folder), "--server", "http://127.0.0.1:9", "--gallery", "staff", *options]) == code
        out, err = capsys.readouterr()
        assert out == "" and said in err.strip().splitlines()[-1]
