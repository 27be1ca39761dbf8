"""The demo's own parts on real bundles, a real server and real processes; no training."""

from __future__ import annotations

import io
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.cli.demo import main
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.demo.faces import draw_groups, images_drawn, split_groups
from pkd.toolkit.demo.figure import draw_picture, page
from pkd.toolkit.demo.processes import Client, StepFailed, Steps, command
from pkd.toolkit.demo.run import Attempt, Outcome, demo_folder, match_visitors, summary
from pkd.toolkit.images.codec import read_rgb
from pkd.toolkit.synthetic.faces import write_faces
from tests.support import serving_bundles as made

QUIET = Console(stderr=True, quiet=True)


@pytest.fixture(scope="module")
def visitors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visitors")
    write_faces(folder, 1, 6, 3)
    return folder


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, visitors: Path) -> Outcome:
    """Try the door with a real server on two small real encoders."""
    folder = tmp_path_factory.mktemp("demo")
    teacher, student = map(Bundle.open, made.family(folder).folders[:2])
    (certificate,) = (c for c in student.certificates() if c.gallery == teacher.manifest.encoder.id)
    with Steps(folder, QUIET).serve("pkd-serve", teacher.path, student.path, "--port", "0") as server:
        attempts = match_visitors(server, student, teacher, visitors, certificate.points[0].fmr)
    parameters = {"teacher": 400, "student": 90}
    point = certificate.points[0]
    return Outcome(True, teacher, student, certificate, point, attempts, {"total": 3.0}, parameters)


def test_every_query_meets_its_own_gallery_image_and_others(outcome: Outcome) -> None:
    genuine, impostor = outcome.of(True), outcome.of(False)
    assert len(genuine) == 6 * 2
    assert len(impostor) == 6 * 2 * 5
    assert all(a.query.parent == a.gallery.parent for a in genuine)
    assert all(a.query.parent != a.gallery.parent for a in impostor)
    assert all(a.match is (a.score >= outcome.threshold) for a in outcome.attempts)


def test_the_server_scores_what_the_two_encoders_say(outcome: Outcome) -> None:
    from pkd.toolkit.encoders.base import open_bundle

    student, teacher = open_bundle(outcome.student), open_bundle(outcome.teacher)
    for attempt in outcome.attempts[:3]:
        a = student.embed(read_rgb(attempt.query)[None])[0]
        b = teacher.embed(read_rgb(attempt.gallery)[None])[0]
        assert attempt.score == pytest.approx(float(a @ b), abs=1e-5)


def test_picture_and_page_tell_the_counts_and_say_synthetic(outcome: Outcome, tmp_path: Path) -> None:
    draw_picture(outcome, tmp_path / "demo.png")
    assert read_rgb(tmp_path / "demo.png").shape == (1215, 1800, 3)
    told = summary(outcome)
    assert told["genuine"]["queries"] == 12
    assert told["impostor"]["matched"] == sum(a.match for a in outcome.of(False))
    html = page("<html><header>one</header><p>two</p></html>", told, tmp_path / "demo.png")
    assert "Synthetic visitors" in html
    assert "data:image/png;base64," in html
    assert html.index("one") < html.index("Over HTTP") < html.index("two")
    assert 'src="http' not in html


def test_a_wrong_decision_is_shown_as_wrong(outcome: Outcome, tmp_path: Path) -> None:
    """The picture changes where the middle impostor is accepted instead of refused."""
    flipped = [
        Attempt(a.query, a.gallery, a.genuine, not a.match, a.score, a.fmr_at_score, a.fmr_ci95)
        for a in outcome.attempts
    ]
    draw_picture(outcome, tmp_path / "a.png")
    other = Outcome(
        outcome.synthetic, outcome.teacher, outcome.student, outcome.certificate, outcome.point, flipped,
        outcome.seconds, outcome.parameters,
    )  # fmt: skip
    draw_picture(other, tmp_path / "b.png")
    assert not np.array_equal(read_rgb(tmp_path / "a.png"), read_rgb(tmp_path / "b.png"))


def test_a_refusal_carries_the_server_s_words(tmp_path: Path, visitors: Path) -> None:
    teacher = made.family(tmp_path).folders[0]
    crop = next(visitors.rglob("*.png"))
    with Steps(tmp_path, QUIET).serve("pkd-serve", teacher, "--port", "0") as server:
        with pytest.raises(StepFailed, match=r"404 .*nobody"):
            server.embed(crop, "nobody")
        url = server.url
    assert not Client(url).ready()


def test_the_server_is_stopped_when_something_fails(tmp_path: Path) -> None:
    teacher = made.family(tmp_path).folders[0]
    url = ""
    serving = Steps(tmp_path, QUIET).serve("pkd-serve", teacher, "--port", "0")
    with pytest.raises(KeyboardInterrupt), serving as server:
        url = server.url
        raise KeyboardInterrupt
    assert not Client(url).ready()


def test_a_server_that_cannot_start_ends_the_demo_with_its_message(tmp_path: Path) -> None:
    serving = Steps(tmp_path, QUIET).serve("pkd-serve", tmp_path / "nothing-here")
    with pytest.raises(StepFailed, match=r"pkd-serve: .*nothing-here") as caught, serving:
        pytest.fail("it started")
    assert caught.value.exit_code == 2


def test_a_failing_step_has_its_last_line_and_exit_code(tmp_path: Path) -> None:
    steps = Steps(tmp_path, QUIET)
    with pytest.raises(StepFailed, match=r"exports: pkd-export: .*no-such-run") as caught:
        steps.run("exports", "pkd-export", tmp_path / "no-such-run", "-o", tmp_path / "bundle")
    assert caught.value.exit_code == 2
    assert "no-such-run" in (tmp_path / "logs/exports.log").read_text()
    assert steps.run("version", "pkd-align", "--version").startswith("pkd ")


def test_commands_are_printed_so_that_a_shell_can_run_them(tmp_path: Path) -> None:
    said = io.StringIO()
    steps = Steps(tmp_path, Console(file=said, width=40))
    with pytest.raises(StepFailed):
        steps.run("align", "pkd-align", tmp_path / "a folder", tmp_path / "b", "--detector", "x")
    assert f"$ pkd-align '{tmp_path}/a folder' {tmp_path}/b --detector x\n" in said.getvalue()


def test_a_missing_command_names_the_remedy() -> None:
    with pytest.raises(InputError, match=r"pkd-nothing: not found beside .* pip install"):
        command("pkd-nothing")


def test_groups_share_nobody_and_are_what_was_announced(tmp_path: Path) -> None:
    done: list[int] = []
    groups = draw_groups(tmp_path, 4, 2, done.append)
    people = [set(FaceSet.read(g).identities) for g in (groups.train, groups.test, groups.visitors)]
    assert [len(p) for p in people] == [4, 48, 4]
    assert not people[0] & people[1] and not people[1] & people[2] and not people[0] & people[2]
    assert sum(done) == images_drawn(4, 2)


def test_real_crops_are_split_by_identity(tmp_path: Path) -> None:
    source = tmp_path / "crops"
    write_faces(source, 3, 82, 2, difficulty=0.0)
    write_faces(source, 3, 3, 1, first=200)
    groups = split_groups(tmp_path / "out", source)
    sets = [FaceSet.read(g) for g in (groups.train, groups.test, groups.visitors)]
    assert sum(len(s) for s in sets) == 82 * 2 + 3
    people = [set(s.identities) for s in sets]
    assert [len(p) for p in people] == [85 - 48 - 10, 48, 10]
    assert len(people[0] | people[1] | people[2]) == 85
    with pytest.raises(InputError, match="identities have two or more images"):
        split_groups(tmp_path / "few", groups.visitors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--faces", "x"], "--faces and --teacher go together"),
        (["--teacher", "x"], "--faces and --teacher go together"),
        (["--teacher-preprocess", "mean=0,std=1"], "Give --teacher, too"),
        (["--faces", "missing", "--teacher", "x"], "missing: no such folder"),
        (["--minutes", "3"], "--minutes goes with --faces and --teacher"),
        (["--faces", ".", "--teacher", "x", "--minutes", "0"], "must be above 0"),
        (["--faces", ".", "--teacher", "x", "--minutes", "-1"], "must be above 0"),
        (["--faces", ".", "--teacher", "x", "--minutes", "1", "--steps", "1"], "give one of them"),
        (["--steps", "0"], "must be above 0"),
        (["--identities", "1"], "at least 2 people"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_only_a_demo_s_own_folder_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.txt").write_text("keep")
    with (
        pytest.raises(InputError, match="not empty and not the folder of an earlier demo"),
        demo_folder(tmp_path / "photos"),
    ):
        pytest.fail("cleared")
    with demo_folder(tmp_path / "demo"):
        (tmp_path / "demo/runs").mkdir()
        (tmp_path / "demo/notes.txt").write_text("keep")
        with pytest.raises(InputError, match="another demo is running"), demo_folder(tmp_path / "demo"):
            pytest.fail("two at once")
    with demo_folder(tmp_path / "demo"):
        assert not (tmp_path / "demo/runs").exists()
        assert (tmp_path / "demo/notes.txt").read_text() == "keep"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"), demo_folder(tmp_path / "file"):
        pytest.fail("a file")


def test_ctrl_c_stops_the_step_in_progress(tmp_path: Path) -> None:
    """SIGINT while faces are drawn or a step runs: exit 130, one line, no process left behind."""
    process = subprocess.Popen(
        [command("pkd-demo"), "--out", tmp_path / "out", "--identities", "4", "--images", "4", "--steps", "5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    )  # fmt: skip
    killer = threading.Timer(120, process.kill)
    killer.start()
    log = tmp_path / "out/logs/teacher.log"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    killer.cancel()
    assert process.returncode == 130, said
    assert said.rstrip().endswith("pkd-demo: stopped.")
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "out/runs") not in left
