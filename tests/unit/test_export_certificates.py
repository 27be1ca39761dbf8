from __future__ import annotations

from pathlib import Path

import pytest
from bundle_factory import certificate, content

from pkd.export.certificates import collect
from pkd.toolkit.certificate import Certificate
from pkd.toolkit.errors import InputError

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
    files = collect([evaluation(tmp_path / "e", *own, pair(OTHER, OTHER), report="<p>")], INFO)
    assert files == {
        "report.html": b"<p>",
        **{f"certificates/{made.file_name}": made.model_dump_json().encode() for made in own},
    }


def test_a_folder_of_certificates_or_a_single_file_will_do(tmp_path: Path) -> None:
    made = pair(INFO.id, OTHER)
    folder = evaluation(tmp_path / "e", made) / "certificates"
    assert list(collect([folder], INFO)) == list(collect([folder / made.file_name], INFO))


def test_several_evaluations_add_up_and_repeats_count_once(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "1", pair(INFO.id, OTHER), report="first")
    two = evaluation(tmp_path / "2", pair(OTHER, INFO.id), report="second")
    files = collect([one, two, one], INFO)
    assert len(files) == 3
    assert files["report.html"] == b"first"


def test_an_evaluation_of_others_is_refused_with_their_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"they are about other@1111111111\."):
        collect([evaluation(tmp_path / "e", pair(OTHER, OTHER))], INFO)


def test_two_different_certificates_of_one_pair_are_refused(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "1", pair(INFO.id, OTHER))
    two = evaluation(tmp_path / "2", pair(INFO.id, OTHER, data_name="another"))
    with pytest.raises(InputError, match="a second certificate"):
        collect([one, two], INFO)


def test_a_certificate_of_another_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="certifies the space"):
        collect([evaluation(tmp_path / "e", certificate(INFO.id, OTHER, "elsewhere@sha256:00"))], INFO)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("{}")])
def test_what_holds_no_certificates_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "e")  # type: ignore[operator]
    with pytest.raises(InputError, match=r"e: (no certificates there|not a certificate)"):
        collect([tmp_path / "e"], INFO)
