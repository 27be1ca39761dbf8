"""A bundle is assembled from its parts and from another bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.export.assembly import collect_certificates
from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.certificates.signing import Signature
from pkd.toolkit.core.errors import InputError, NotTrusted
from tests.support.bundle_factory import certificate, content

INFO = content()[1].encoder
OTHER = "other@sha256:" + "1" * 64


def evaluation(folder: Path, *certificates: Certificate, report: str | None = None) -> Path:
    (folder / "certificates").mkdir(parents=True)
    for made in certificates:
        (folder / "certificates" / made.file_name).write_text(made.model_dump_json())
    (folder / "report.json").write_text("{}")  # not a certificate, and beside them
    if report:
        (folder / "report.html").write_text(report)
    return folder


def pair(query: str, gallery: str, **more: str) -> Certificate:
    return certificate(query, gallery, INFO.space.id, **more)


def test_own_certificates_and_the_report_are_taken(tmp_path: Path) -> None:
    own = pair(OTHER, INFO.id), pair(INFO.id, INFO.id)
    files = collect_certificates([evaluation(tmp_path / "e", *own, pair(OTHER, OTHER), report="<p>")], INFO)
    assert files == {
        "report.html": b"<p>",
        **{f"certificates/{made.file_name}": made.model_dump_json().encode() for made in own},
    }


def test_a_folder_of_certificates_or_a_single_file_will_do(tmp_path: Path) -> None:
    made = pair(INFO.id, OTHER)
    folder = evaluation(tmp_path / "e", made) / "certificates"
    assert list(collect_certificates([folder], INFO)) == list(collect_certificates([folder / made.file_name], INFO))


def test_several_evaluations_add_up_and_repeats_count_once(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "1", pair(INFO.id, OTHER), report="first")
    two = evaluation(tmp_path / "2", pair(OTHER, INFO.id), report="second")
    files = collect_certificates([one, two, one], INFO)
    assert len(files) == 3
    assert files["report.html"] == b"first"


def test_an_evaluation_of_others_is_refused_with_their_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"they are about other@1111111111\."):
        collect_certificates([evaluation(tmp_path / "e", pair(OTHER, OTHER))], INFO)


def test_two_different_certificates_of_one_pair_are_refused(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "1", pair(INFO.id, OTHER))
    two = evaluation(tmp_path / "2", pair(INFO.id, OTHER, data_name="another"))
    with pytest.raises(InputError, match="a second certificate"):
        collect_certificates([one, two], INFO)


def test_a_certificate_of_another_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="certifies the space"):
        collect_certificates([evaluation(tmp_path / "e", certificate(INFO.id, OTHER, "elsewhere@sha256:00"))], INFO)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("{}")])
def test_what_holds_no_certificates_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "e")  # type: ignore[operator]
    with pytest.raises(InputError, match=r"e: (no certificates there|not a certificate)"):
        collect_certificates([tmp_path / "e"], INFO)


def sign(path: Path, key: str = "0") -> bytes:
    """Make a signature file in form; export has no keys to check it with."""
    data = Signature(f"sha256:{key * 64}", bytes(64)).text()
    path.with_name(path.name + ".sig").write_bytes(data)
    return data


def test_signatures_travel_with_their_certificates(tmp_path: Path) -> None:
    made, unsigned = pair(INFO.id, OTHER), pair(OTHER, INFO.id)
    folder = evaluation(tmp_path / "e", made, unsigned)
    signature = sign(folder / "certificates" / made.file_name)
    name = f"certificates/{made.file_name}"
    files = collect_certificates([folder], INFO)
    assert set(files) == {name, f"{name}.sig", f"certificates/{unsigned.file_name}"}
    assert files[f"{name}.sig"] == signature
    assert set(collect_certificates([folder / name], INFO)) == {name, f"{name}.sig"}


def test_a_signature_of_one_copy_is_enough_and_two_keys_are_too_many(tmp_path: Path) -> None:
    made = pair(INFO.id, OTHER)
    folders = [evaluation(tmp_path / str(i), made) for i in range(3)]
    sign(folders[1] / "certificates" / made.file_name)
    assert len(collect_certificates(folders, INFO)) == 2
    sign(folders[2] / "certificates" / made.file_name, key="1")
    with pytest.raises(InputError, match="signed by two keys"):
        collect_certificates(folders, INFO)


def test_what_is_no_signature_is_refused_by_name(tmp_path: Path) -> None:
    made = pair(INFO.id, OTHER)
    folder = evaluation(tmp_path / "e", made)
    (folder / "certificates" / f"{made.file_name}.sig").write_text("hello")
    with pytest.raises(NotTrusted, match=r"\.json\.sig: not a signature file"):
        collect_certificates([folder], INFO)
