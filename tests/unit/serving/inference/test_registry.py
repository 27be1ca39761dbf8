"""Which encoder a request means, and which certificate joins two of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pkd.serving.core.errors import UnknownEncoder
from pkd.serving.inference.registry import Encoders, Loaded
from pkd.serving.matching.verification import describe_certificate
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.certificates.signing import SigningKey, TrustedKeys
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import BundleError, NotCertified, NotTrusted, PkdError, SpaceMismatch
from tests.support import serving_bundles as made


@pytest.fixture(scope="module")
def encoders(family: made.Family) -> Any:
    return Encoders.open(family.folders)


def test_the_first_teacher_is_the_default_wherever_it_stands(family: made.Family) -> None:
    assert Encoders.open(family.folders[::-1]).get(None).encoder.info == family.stranger.info
    assert Encoders.open(family.folders[1::-1]).get(None).encoder.info == family.teacher.info


def test_without_a_teacher_the_first_bundle_is_the_default(family: made.Family) -> None:
    assert Encoders.open([family.folders[1]]).get(None).encoder.info == family.student.info


def test_an_encoder_is_found_by_id_short_id_and_name(encoders: Any, family: made.Family) -> None:
    info = family.student.info
    for spec in (info.id, short(info.id), info.name):
        assert encoders.get(spec).encoder.info.id == info.id


def test_a_name_that_two_encoders_share_names_neither(tmp_path: Path) -> None:
    one, two = made.encoder("same", made.weights(1)), made.encoder("same", made.weights(2))
    one.write(tmp_path / "1"), two.write(tmp_path / "2")
    encoders = Encoders.open([tmp_path / "1", tmp_path / "2"])
    with pytest.raises(PkdError) as refused:
        encoders.get("same")
    assert isinstance(refused.value, UnknownEncoder)
    assert refused.value.details["encoders"] == [one.info.id, two.info.id]
    assert "2 encoders are called 'same'" in str(refused.value)
    with pytest.raises(PkdError, match=short(two.info.id)):
        encoders.resolve("same")


def test_a_name_is_the_loaded_one_s_where_certificates_know_others(tmp_path: Path, family: made.Family) -> None:
    """As targets of a student that were certified, and are not served."""
    other = made.encoder("student", made.weights(9), family.teacher.info.space)
    family.student.write(tmp_path / "student", [made.certificate(family.student.info, other.info)])
    encoders = Encoders.open([tmp_path / "student"])
    assert encoders.get("student").encoder.info == family.student.info
    with pytest.raises(PkdError, match="2 encoders are called"):  # of an embedding it would be a guess
        encoders.resolve("student")


def test_a_bundle_s_own_encoder_goes_before_its_targets(tmp_path: Path, family: made.Family) -> None:
    target = made.encoder("student", made.weights(9), family.teacher.info.space)
    family.student.write(tmp_path / "student"), target.write(tmp_path / "target")
    own, form = (Loaded.open(tmp_path / name) for name in ("student", "target"))
    half = Target.model_construct(name="onnxruntime-fp16", runtime="onnxruntime", precision="fp16")
    encoders = Encoders([replace(form, target=half), own])
    assert encoders.get("student").encoder.info == family.student.info
    assert encoders.get(short(target.info.id)).encoder.info == target.info


def test_an_encoder_known_from_a_certificate_alone_can_be_compared_but_not_run(family: made.Family) -> None:
    encoders = Encoders.open([family.folders[1]])
    file = encoders.certificate_file(family.student.info.id, family.teacher.info.id)
    assert file.certificate.query == family.student.info.id
    assert encoders.space_of(family.teacher.info.id) == family.teacher.info.space.id
    with pytest.raises(PkdError) as refused:
        encoders.get(family.teacher.info.id)
    assert isinstance(refused.value, UnknownEncoder)


def test_the_order_of_the_pair_counts(encoders: Any, family: made.Family) -> None:
    student, teacher = family.student.info.id, family.teacher.info.id
    assert encoders.certificate_file(student, teacher).certificate.gallery == teacher
    with pytest.raises(PkdError) as refused:
        encoders.certificate_file(teacher, student)
    assert isinstance(refused.value, NotCertified)
    assert refused.value.details["got"] == {"query": teacher, "gallery": student}
    assert refused.value.details["works"] == {"queries": [], "galleries": [teacher]}
    assert {"query": student, "gallery": teacher} in refused.value.details["expected"]


def test_different_spaces_are_a_mismatch(encoders: Any, family: made.Family) -> None:
    with pytest.raises(PkdError) as refused:
        encoders.certificate_file(family.stranger.info.id, family.teacher.info.id)
    assert isinstance(refused.value, SpaceMismatch)
    assert refused.value.details["works"]["queries"] == sorted([family.student.info.id, family.teacher.info.id])


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        ({"synthetic": True, "impostor_pairs": 9_000_000}, {"synthetic": False, "impostor_pairs": 10}),
        ({"impostor_pairs": 10}, {"impostor_pairs": 11}),
        ({"created": "2026-01-01T00:00:00Z"}, {"created": "2026-01-02T00:00:00Z"}),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_of_two_certificates_of_a_pair_the_stronger_counts(tmp_path: Path, weak: Any, strong: Any, order: Any) -> None:
    teacher = made.encoder("teacher", made.weights(1))
    student = made.encoder("student", made.weights(2), teacher.info.space)
    pair = student.info, teacher.info
    student.write(tmp_path / "a", [made.certificate(*pair, **weak)])
    teacher.write(tmp_path / "b", [made.certificate(*pair, **strong)])
    encoders = Encoders.open([tmp_path / "a", tmp_path / "b"][::order])
    found = encoders.certificate_file(student.info.id, teacher.info.id).certificate
    assert {name: getattr(found, name) for name in strong} == strong


def test_the_same_encoder_twice_is_refused(family: made.Family, tmp_path: Path) -> None:
    family.teacher.write(tmp_path / "copy")
    with pytest.raises(BundleError, match=r"copy: holds teacher@.* as does .*teacher\. Pass one"):
        Encoders.open([family.folders[0], tmp_path / "copy"])


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    made.encoder("teacher", made.weights(1)).write(tmp_path / "t")
    with (tmp_path / "t" / "encoder.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="SHA-256"):
        Encoders.open([tmp_path / "t"])


def test_with_keys_every_bundle_must_be_signed_and_a_signed_certificate_by_one_of_them(
    family: made.Family, tmp_path: Path
) -> None:
    ours, theirs = (SigningKey(Ed25519PrivateKey.generate()) for _ in range(2))
    keys = TrustedKeys([ours.private.public_key()])
    own = made.certificate(family.teacher.info, family.teacher.info)
    mixed = made.certificate(family.student.info, family.teacher.info)
    family.teacher.write(tmp_path / "signed", [own], key=ours, sealed=ours)
    family.student.write(tmp_path / "sealed", [mixed], sealed=ours)  # the certificate is vouched for by the manifest
    opened = Encoders.open([tmp_path / "signed", tmp_path / "sealed"], keys)
    assert opened.certificates == [own, mixed]
    own_file = opened.certificate_file(own.query, own.gallery)
    mixed_file = opened.certificate_file(mixed.query, mixed.gallery)
    assert own_file.signature.key == own_file.bundle.key == mixed_file.bundle.key == ours.fingerprint  # type: ignore[union-attr]
    assert mixed_file.signature is None
    told = [describe_certificate(opened, file).signature for file in (mixed_file, own_file)]
    assert [one and (one.covers, one.verified) for one in told] == [("bundle", True), ("certificate", True)]

    foreign = f"is signed by {theirs.fingerprint}, trusted is {ours.fingerprint}"
    certificate = f"certificates/{mixed.file_name}"
    for name, key, sealed, file, said in (
        ("unsigned", None, None, "manifest.json", "is not signed"),
        ("only the certificate", ours, None, "manifest.json", "is not signed"),
        ("foreign", ours, theirs, "manifest.json", foreign),
        ("foreign certificate", theirs, ours, certificate, foreign),
    ):
        family.student.write(tmp_path / name, [mixed], key=key, sealed=sealed)
        with pytest.raises(NotTrusted, match=said) as refused:
            Encoders.open([tmp_path / "signed", tmp_path / name], keys)
        assert str(refused.value).startswith(str(tmp_path / name / file))
        Encoders.open([tmp_path / "signed", tmp_path / name])


def test_a_zip_is_served_like_its_folder(family: made.Family, tmp_path: Path) -> None:
    key = SigningKey(Ed25519PrivateKey.generate())
    zipped = family.teacher.write(tmp_path / "t", sealed=key).pack(tmp_path / "t.zip")
    (loaded,) = Encoders.open([zipped], TrustedKeys([key.private.public_key()])).loaded.values()
    assert loaded.encoder.info == family.teacher.info and loaded.self_test() < 1e-6


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a student in two precisions, certified in fp16 alone; int8 is so coarse that its self-test fails."""
    folder, matrix = tmp_path_factory.mktemp("targets"), made.weights(1, noise=0.2)
    teacher = made.encoder("teacher", made.weights(1))
    student = made.encoder("student", matrix, teacher.info.space)
    half = student.rounded("fp16", matrix.astype(np.float16).astype(np.float32))
    coarse = student.rounded("int8", np.sign(matrix))
    teacher.write(folder / "teacher")
    certified = [made.certificate(half.info, teacher.info)]
    student.write(folder / "student", certified, targets={"fp16": half, "int8": coarse})
    return folder, student, half


def test_a_target_is_served_as_the_encoder_that_it_is(rounded: Any) -> None:
    folder, student, half = rounded
    paths = [folder / "teacher", folder / "student", folder / "student/targets/onnxruntime-fp16"]
    encoders = Encoders.open(paths)
    teacher = encoders.default.encoder.info
    assert list(encoders.loaded) == [teacher.id, student.info.id, half.info.id]
    crops = made.crops(3)
    answered = encoders.get(half.info.id)
    np.testing.assert_allclose(answered.encoder.embed(crops), half.embed(crops), atol=1e-6)
    assert np.abs(answered.encoder.embed(crops) - student.embed(crops)).max() > 1e-5
    assert encoders.certificate_file(half.info.id, teacher.id)
    with pytest.raises(PkdError) as refused:
        encoders.certificate_file(student.info.id, teacher.id)
    assert refused.value.details["works"]["queries"] == [half.info.id]


def test_a_target_is_held_to_its_own_tolerance(rounded: Any) -> None:
    folder, _, half = rounded
    opened = Encoders.open([folder / f"student/targets/onnxruntime-{p}" for p in ("fp16", "int8")])
    passed, failed = opened.loaded.values()
    assert passed.encoder.info == half.info
    assert 0 < passed.self_test() < 1e-4
    with pytest.raises(BundleError, match=r"onnxruntime-int8: golden crops come out .*allowed 0\.001"):
        failed.self_test()


def test_a_target_that_computes_the_bundles_own_encoder_is_that_encoder(tmp_path: Path) -> None:
    own = made.encoder("teacher", made.weights(1))
    own.write(tmp_path / "t", targets={"fp32": own})
    with pytest.raises(BundleError, match=r"onnxruntime-fp32: holds teacher@.* as does .*t\. Pass one"):
        Encoders.open([tmp_path / "t", tmp_path / "t/targets/onnxruntime-fp32"])
    with pytest.raises(BundleError, match="has no target ncnn-fp32; it has onnxruntime-fp32"):
        Encoders.open([tmp_path / "t/targets/ncnn-fp32"])
