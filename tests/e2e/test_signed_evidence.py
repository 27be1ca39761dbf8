"""From a key to a server: signed certificates as an operator makes, checks, ships and serves them, and as others forge
them. Every command is the real one; most run in this process, for a start costs a second of CPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from pkd.export.cli import main as export
from pkd.serving.cli.serve import main as serve
from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.certificates.signing import PASSPHRASE, SigningKey
from pkd.toolkit.cli.evaluate import main as evaluate
from pkd.toolkit.cli.verify import main as verify
from pkd.toolkit.evaluation.results.schema import Evaluation
from tests.support.evaluation_faces import PREPROCESS, teacher_info, write_people, write_student, write_teacher
from tests.support.server_process import serving

BIN = Path(sys.executable).parent
PEOPLE = 60
Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faces/, labels.csv, teacher.onnx, student/, key.pem, other.pem and signed evaluation/, bundle/, bundle.zip."""
    folder = tmp_path_factory.mktemp("evidence")
    write_people(folder / "faces", [3] * PEOPLE)
    rows = [f"p{i:03d},{'f & <x>' if i % 2 else 'm'},{'' if i < 3 else 'young'}" for i in range(PEOPLE)]
    (folder / "labels.csv").write_text("identity,sex,age\n" + "\n".join(rows) + "\n")
    write_teacher(folder)
    write_student(folder, teacher_info(folder / "teacher.onnx").space)
    for name in ("key", "other"):
        made = subprocess.run([BIN / "pkd-verify", "--new-key", folder / f"{name}.pem", "--json"], capture_output=True)
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["public"] == str(folder / f"{name}.pub.pem")
    more = ["--sign", folder / "key.pem", "--demographics", folder / "labels.csv"]
    done = subprocess.run(
        [BIN / "pkd-evaluate", *measuring(folder, "evaluation", *more)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 identities have no age (first: p000, p001, p002)" in done.stderr
    source: list[str | Path] = ["--teacher", folder / "teacher.onnx", "--teacher-preprocess", PREPROCESS]
    more: list[str | Path] = [  # type: ignore[no-redef]
        "--certificates",
        folder / "evaluation",
        "--sign",
        folder / "key.pem",
        "--zip",
        "-o",
        folder / "bundle",
    ]
    done = subprocess.run([BIN / "pkd-export", *source, *more], capture_output=True, text=True)  # type: ignore[list-item]
    assert done.returncode == 0, done.stderr
    assert "signed by: sha256:" in done.stderr and "bundle.zip" in done.stderr
    return folder


def measuring(world: Path, out: str, *more: object) -> list[str]:
    given = ["--teacher", world / "teacher.onnx", "--teacher-preprocess", PREPROCESS, "--faces", world / "faces"]
    given += ["--student", world / "student", "--synthetic", "--bootstrap", "100", "--jobs", "1"]
    return [str(x) for x in (*given, "--cache", world / "cache", "--out", world / out, *more)]


@pytest.fixture
def evaluation(world: Path, tmp_path: Path) -> Path:
    """Copy the evaluation, to tamper with."""
    return Path(shutil.copytree(world / "evaluation", tmp_path / "evaluation"))


def mixed(evaluation: Path) -> Path:
    return next((evaluation / "certificates").glob("student*__teacher*.json"))


def checked(*arguments: object) -> int:
    return verify([str(a) for a in arguments])


def failures(capsys: Out, *arguments: object) -> list[tuple[str, str, str]]:
    """File, question and detail of every check that failed; the command must have failed, too."""
    capsys.readouterr()
    assert checked(*arguments, "--json") == 4
    checks = [check for target in json.loads(capsys.readouterr().out)["targets"] for check in target["checks"]]
    return [(c["file"], c["question"], c["detail"]) for c in checks if c["result"] == "failed"]


def change_digit(path: Path, field: str) -> None:
    """Flip one digit of the first number after ``field``."""
    text = path.read_text()
    found = re.search(rf'"{field}": 0\.\d\d(\d)', text)
    assert found
    path.write_text(text[: found.start(1)] + str((int(found[1]) + 1) % 10) + text[found.end(1) :])


def test_what_was_signed_is_accepted(world: Path, capsys: Out) -> None:
    targets = [world / "evaluation", world / "bundle", world / "bundle.zip", mixed(world / "evaluation")]
    assert checked(*targets, "--trust-key", world / "key.pub.pem") == 0
    assert "authenticity" not in capsys.readouterr().err
    assert checked(*targets, "--trust-key", world / "other.pub.pem", "--trust-key", world / "key.pub.pem") == 0
    done = subprocess.run([BIN / "pkd-verify", *targets, "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    told = json.loads(done.stdout)
    assert (told["trusted"], told["authenticity"]) == (True, "not checked")
    results = {c["result"] for t in told["targets"] for c in t["checks"] if c["question"] == "signature"}
    assert results == {"not checked"}


def test_without_a_key_it_says_that_authenticity_was_not_checked(world: Path, capsys: Out) -> None:
    assert checked(world / "evaluation") == 0
    assert "authenticity was not: anyone may have made this" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["threshold", "tar", "tar_balanced"])
def test_one_changed_digit_is_found_with_and_without_a_key(
    world: Path, evaluation: Path, capsys: Out, field: str
) -> None:
    trust = ("--trust-key", world / "key.pub.pem")
    for path in (mixed(evaluation), evaluation / "report.json"):
        before = path.read_bytes()
        change_digit(path, field)
        assert failures(capsys, evaluation)
        found = failures(capsys, evaluation, *trust)
        assert any(q == "signature" and path.name in f and "was changed after" in why for f, q, why in found)
        path.write_bytes(before)
    assert checked(evaluation, *trust) == 0


def test_another_key_is_refused(world: Path, capsys: Out) -> None:
    for target in (world / "evaluation", world / "bundle", world / "bundle.zip", mixed(world / "evaluation")):
        assert checked(target, "--trust-key", world / "other.pub.pem") == 4
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("pkd-verify: ") and "is signed by sha256:" in last and "trusted is sha256:" in last


def test_an_unsigned_evaluation_is_whole_but_not_authentic(world: Path, capsys: Out) -> None:
    """Over a signed one: no signature of the older run is left."""
    shutil.copytree(world / "evaluation", world / "unsigned")
    assert evaluate(measuring(world, "unsigned")) == 0
    assert not list((world / "unsigned").rglob("*.sig"))
    assert checked(world / "unsigned") == 0
    assert checked(world / "unsigned", "--trust-key", world / "key.pub.pem") == 4
    assert "is not signed" in capsys.readouterr().err.strip().splitlines()[-1]


def test_certificates_that_change_places_are_found(world: Path, evaluation: Path, capsys: Out) -> None:
    a, b = sorted((evaluation / "certificates").glob("*.json"))[:2]
    for suffix, why in (("", "or the signature is another file's"), (".sig", "differ from report.json")):
        one, two = (path.with_name(path.name + suffix) for path in (a, b))
        kept = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(kept)
        found = failures(capsys, evaluation, "--trust-key", world / "key.pub.pem")
        assert {f.split("/")[-1] for f, _, said in found if why in said} == {a.name, b.name}


def test_an_older_certificate_in_the_place_of_the_newer_is_found(world: Path, evaluation: Path, capsys: Out) -> None:
    assert evaluate(measuring(world, "older", "--seed", "1", "--sign", world / "key.pem")) == 0
    name = mixed(evaluation).name
    for suffix in ("", ".sig"):
        shutil.copy(world / "older/certificates" / f"{name}{suffix}", evaluation / "certificates")
    trust = ("--trust-key", world / "key.pub.pem")
    assert checked(mixed(evaluation), *trust) == 0  # alone it is what it says: authentic, and older
    ((file, question, why),) = failures(capsys, evaluation, *trust)
    assert (file, question) == (f"certificates/{name}", "agrees with report.json") and "seed" in why


def test_missing_and_additional_files_are_found(world: Path, evaluation: Path, capsys: Out) -> None:
    trust = ("--trust-key", world / "key.pub.pem")
    path = mixed(evaluation)
    aside = path.rename(path.with_name("other-name.json"))
    said = " ".join(why for _, _, why in failures(capsys, evaluation))
    assert "report.json names it" in said and "report.json knows no such certificate" in said
    aside.rename(path)
    signature = path.with_name(path.name + ".sig")
    kept = signature.read_bytes()
    signature.write_bytes(b"")
    assert checked(evaluation) == checked(evaluation, *trust) == 4
    signature.unlink()
    assert checked(evaluation) == 0 and checked(evaluation, *trust) == 4
    signature.write_bytes(kept)
    path.unlink()
    assert checked(evaluation, *trust) == 4
    path.mkdir()
    assert checked(evaluation, *trust) == 4


def test_bad_usage_is_one_clear_line(world: Path, tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rsa.pem").write_text("hello")
    for arguments, said in (
        ([], "what to check?"),
        ([tmp_path / "nothing"], "no such file or folder"),
        ([tmp_path / "empty"], "holds neither report.json nor manifest.json"),
        ([world / "evaluation/report.json"], "Give the folder of the evaluation"),
        ([world / "bundle", "--new-key", tmp_path / "k.pem"], "what to check?"),
        (["--new-key", world / "key.pem"], "never replaced"),
        (["--new-key", tmp_path / "no/k.pem"], "No such file or directory"),
        ([world / "bundle", "--trust-key", tmp_path / "none.pem"], "none.pem: No such file"),
        ([world / "bundle", "--trust-key", world / "key.pem"], "is a private key"),
        ([world / "bundle", "--trust-key", tmp_path / "rsa.pem"], "not a public key"),
    ):
        assert checked(*arguments) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error and error.startswith("pkd-verify: ")
    for arguments, said in (
        (["--sign", world / "key.pub.pem"], "is a public key"),
        (["--sign", tmp_path / "none.pem"], "No such file"),
        (["--demographics", world / "none.csv"], "No such file"),
        (["--demographics", world / "key.pub.pem"], "not a header"),
        (["--pairs", world / "pairs.txt", "--demographics", world / "labels.csv"], "--demographics goes with --faces"),
    ):
        assert evaluate(measuring(world, "never", *arguments)) == 2
        assert said in capsys.readouterr().err.strip()
    assert not (world / "never").exists()


def test_a_certificate_that_is_none_is_not_trusted(world: Path, tmp_path: Path, capsys: Out) -> None:
    for data in (b"", b"{}", b"[]", b"\xff\xfe", b'{"schema_version": 1}', b'{"schema_version": 4}'):
        (tmp_path / "c.json").write_bytes(data)
        assert checked(tmp_path / "c.json") == 4
    assert "Upgrade pkd" in capsys.readouterr().err


def test_an_encrypted_key_signs_with_the_passphrase(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    assert checked("--new-key", world / "locked.pem") == 0
    assert evaluate(measuring(world, "locked", "--sign", world / "locked.pem")) == 0
    assert checked(world / "locked", "--trust-key", world / "locked.pub.pem") == 0
    monkeypatch.setenv(PASSPHRASE, "wrong")
    assert evaluate(measuring(world, "never", "--sign", world / "locked.pem")) == 2
    assert "the passphrase is wrong" in capsys.readouterr().err


def test_groups_are_in_report_and_certificate_and_page(world: Path) -> None:
    made = Evaluation.model_validate_json((world / "evaluation/report.json").read_bytes())
    assert made.labels and made.labels.unlabelled == {"sex": (), "age": ("p000", "p001", "p002")}
    for comparison in made.comparisons:
        sex, age = comparison.demographics
        assert [(g.value, g.identities, g.images) for g in sex.groups] == [("f & <x>", 30, 90), ("m", 30, 90)]
        assert (age.unlabelled, [g.identities for g in age.groups]) == (3, [57])
        factor = 2 if comparison.name == "S–T" else 1
        assert {g.impostor_pairs for g in sex.groups} == {factor * (90 * 89 // 2 - 90)}
        assert [r.fmr for g in sex.groups for r in g.rates] == [None, None]  # 435 pairs of people resolve 0.023
    page = (world / "evaluation/report.html").read_text(encoding="utf-8")
    assert "<h2>Groups</h2>" in page and "too few people" in page and "3 identities have no age" in page
    assert "p000" not in page, "the page travels in bundles, and names of people do not"
    assert "f &amp; &lt;x&gt;" in page and "<x>" not in page


def test_the_bundle_carries_the_signatures(world: Path, tmp_path: Path, capsys: Out) -> None:
    bundle = Bundle.open(world / "bundle")
    files = bundle.certificate_files()
    assert len(files) == 2 and all(file.signature for file in files)
    for file in files:
        assert file.data == (world / "evaluation/certificates" / file.path.name).read_bytes()
    copy = Path(shutil.copytree(world / "bundle", tmp_path / "bundle"))
    (copy / files[0].path.relative_to(world / "bundle")).unlink()
    assert checked(copy) == 4
    unsigned = ["--teacher", world / "student.onnx", "--teacher-preprocess", PREPROCESS, "-o", tmp_path / "plain"]
    assert export([str(x) for x in unsigned]) == 0
    assert checked(tmp_path / "plain") == 0
    assert checked(tmp_path / "plain", "--trust-key", world / "key.pub.pem") == 4
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "manifest.json: is not signed" in last and "pkd-export --sign" in last


def compare(url: str) -> dict[str, object]:
    one, other = [1.0, *[0.0] * 15], [0.6, 0.8, *[0.0] * 14]
    sides = {name: {"embedding": vector, "encoder": "teacher"} for name, vector in (("a", one), ("b", other))}
    answer = httpx.post(f"{url}/verify", json={**sides, "policy": {"target_fmr": 1e-2}})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["certificate"])


def test_a_server_that_trusts_the_key_serves_and_says_so(world: Path) -> None:
    encoder = Bundle.open(world / "bundle").manifest.encoder.id
    with serving(world / "bundle.zip", "--trust-key", world / "key.pub.pem") as server:
        told = compare(server.url)
    assert told["query"] == encoder
    assert isinstance(told["signature"], dict) and told["signature"]["verified"] is True
    assert told["signature"]["covers"] == "certificate"
    assert str(told["signature"]["key"]).startswith("sha256:")


def test_a_server_without_a_key_says_that_nobody_checked(world: Path) -> None:
    with serving(world / "bundle") as server:
        told = compare(server.url)
    assert isinstance(told["signature"], dict) and told["signature"]["verified"] is False


def refused_by_name(capsys: Out, bundle: Path, key: Path, file: str, said: str) -> None:
    """pkd-serve and pkd-verify refuse it with this key and name the file; without a key pkd-verify finds nothing."""
    assert serve([str(bundle), "--trust-key", str(key)]) == 4
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line and file in line, line
    assert any(file in f and said in why for f, _, why in failures(capsys, bundle, "--trust-key", key))
    assert checked(bundle) == 0
    capsys.readouterr()


def test_a_server_refuses_what_its_key_did_not_sign(world: Path, tmp_path: Path, capsys: Out) -> None:
    for key, said in (("key.pem", "is a private key"), ("none.pem", "No such file")):
        assert serve([str(world / "bundle"), "--trust-key", str(world / key)]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
    refused_by_name(capsys, world / "bundle", world / "other.pub.pem", "manifest.json", "is signed by sha256:")

    key = world / "key.pub.pem"  # type: ignore[assignment]
    bundle = Bundle.open(world / "bundle")
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    swapped = {n: d.replace(b'"seed": 0', b'"seed": 1') if n.endswith(".json") else d for n, d in files.items()}
    write_bundle(tmp_path / "unsigned", files, bundle.manifest)  # every certificate is still signed
    write_bundle(tmp_path / "rehashed", swapped, bundle.manifest)  # every hash in the manifest is right
    shutil.copy(world / "bundle/manifest.json.sig", tmp_path / "rehashed")
    write_bundle(tmp_path / "resealed", swapped, bundle.manifest, key=SigningKey.read(world / "key.pem"))
    for name, file, said in (
        ("unsigned", "manifest.json", "is not signed"),
        ("rehashed", "manifest.json", "was changed after"),
        ("resealed", "certificates/", "was changed after"),
    ):
        refused_by_name(capsys, tmp_path / name, key, file, said)  # type: ignore[arg-type]


def test_a_new_target_needs_a_new_signature(world: Path, tmp_path: Path, capsys: Out) -> None:
    copy = Path(shutil.copytree(world / "bundle", tmp_path / "bundle"))
    trust, again = ("--trust-key", world / "key.pub.pem"), ["--from-bundle", str(copy), "--precision", "fp16"]
    assert export([*again, "--sign", str(world / "key.pem")]) == 0
    assert checked(copy, *trust) == 0
    capsys.readouterr()
    assert export(again) == 0
    assert "its old signature is dropped" in capsys.readouterr().err
    assert not (copy / "manifest.json.sig").exists()
    ((file, question, why),) = failures(capsys, copy, *trust)
    assert (file, question) == ("manifest.json", "signature") and "is not signed" in why


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on PATH")
@pytest.mark.parametrize("page", ["certificate", "bundle"])
def test_openssl_alone_verifies_what_was_signed(world: Path, page: str) -> None:
    """The commands of docs/certificate.md and docs/bundle.md."""
    signed = mixed(world / "evaluation") if page == "certificate" else world / "bundle/manifest.json"
    text = (Path(__file__).parents[2] / f"docs/{page}.md").read_text(encoding="utf-8")
    command = next(block for block in re.findall(r"```sh\n(.*?)```", text, re.S) if "pkeyutl" in block)
    command = command.replace("CERTIFICATE.json", signed.name).replace("PUB.pem", str(world / "key.pub.pem"))
    for key, fits in (("key.pub.pem", True), ("other.pub.pem", False)):
        line = ["bash", "-euc", command.replace("key.pub.pem", key)]
        done = subprocess.run(line, cwd=signed.parent, capture_output=True, text=True)
        assert (done.returncode == 0 and "Verified Successfully" in done.stdout) == fits, done.stderr
        assert fits or "Verified Successfully" not in done.stdout
