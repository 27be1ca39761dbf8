"""One test per attack on a bundle. Each is refused, and the message names the file at fault."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_factory import bundle, certificate, content, network, replace_file, rewrite
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pkd.export.to_onnx import serialise
from pkd.toolkit import bundle_folder, bundle_zip, onnx_file
from pkd.toolkit.bundle import Bundle, Golden, pack_golden, write_bundle
from pkd.toolkit.bundle_zip import zip_path
from pkd.toolkit.cli.encoders import open_encoder
from pkd.toolkit.errors import BundleError, NotTrusted, PkdError
from pkd.toolkit.onnx_file import check_onnx
from pkd.toolkit.signing import SigningKey, TrustedKeys
from pkd.toolkit.target import Target
from pkd.toolkit.verification import Check, verify

OURS, THEIRS = (SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))
TRUSTED = TrustedKeys([OURS.private.public_key()])


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A signed bundle with an unsigned certificate."""
    files, manifest = content()
    own = certificate(manifest.encoder.id, manifest.encoder.id, manifest.encoder.space.id)
    files = {**files, f"certificates/{own.file_name}": own.model_dump_json().encode()}
    return write_bundle(tmp_path / "signed", files, manifest, key=OURS).path


def refused(path: Path, said: str, kind: type[PkdError] = BundleError, keys: TrustedKeys | None = None) -> None:
    """Opening says so, and so does pkd-verify, as a failed check instead of a traceback."""
    with pytest.raises(kind, match=said):
        Bundle.open(path, keys)
    assert failed(path, keys)


def failed(path: Path, keys: TrustedKeys | None = None) -> tuple[Check, ...]:
    failures = verify(path, keys).failures
    assert failures
    return failures


# Signatures


def test_a_signed_bundle_is_believed_and_vouches_for_the_certificates_in_it(signed: Path) -> None:
    (file,) = Bundle.open(signed, TRUSTED).certificate_files()
    assert (file.signature, file.bundle) == (None, Bundle.peek(signed).signature)
    verdict = verify(signed, TRUSTED)
    assert not verdict.failures
    told = {check.file: check.detail for check in verdict.checks if check.question == "signature"}
    assert told["manifest.json"] == f"{OURS.fingerprint}, for every file"
    assert told[f"certificates/{file.path.name}"] == (
        f"none of its own; {OURS.fingerprint} signed the bundle that holds it"
    )


@pytest.mark.parametrize("name", ["encoder.onnx", "golden.npz", "certificates/new.json", "report.html"])
def test_a_rehashed_manifest_is_refused(signed: Path, name: str) -> None:
    """Whatever was swapped: every hash is right, and without a key nothing shows."""
    replaced = {
        "encoder.onnx": serialise(onnx.load_model_from_string((signed / "encoder.onnx").read_bytes())),
        "golden.npz": (signed / "golden.npz").read_bytes() + b"\0",
        "certificates/new.json": next((signed / "certificates").iterdir()).read_bytes().replace(b"0.9", b"0.8"),
        "report.html": b"<p>",
    }
    replace_file(signed, name, replaced[name])
    with pytest.raises(NotTrusted, match=r"signed/manifest\.json: was changed after"):
        Bundle.open(signed, TRUSTED)


def test_a_swapped_encoder_whose_golden_embeddings_were_made_again_is_refused(signed: Path) -> None:
    """The attack that signed certificates alone do not stop, for an encoder's id is the digest of its source."""
    from pkd.export.to_onnx import uint8_graph
    from pkd.toolkit.runtime import open_bundle

    _, manifest = content()
    replace_file(signed, "encoder.onnx", serialise(uint8_graph(network(seed=7), manifest.encoder.preprocess, 16)))
    crops = Bundle.peek(signed).golden().crops
    made = open_bundle(Bundle.peek(signed)).embed(crops)
    replace_file(signed, "golden.npz", pack_golden(Golden(crops, made)))
    assert not verify(signed, None).failures
    refused(signed, r"manifest\.json: was changed after", NotTrusted, TRUSTED)


def test_a_swapped_certificate_is_refused(signed: Path) -> None:
    path = next((signed / "certificates").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":1'))
    refused(signed, rf"{path.name}: its SHA-256", keys=TRUSTED)


def test_another_key_or_none_is_refused_before_any_other_file_is_read(signed: Path) -> None:
    (signed / "encoder.onnx").unlink()
    data = (signed / "manifest.json").read_bytes()
    for signature, said in (
        (THEIRS.sign(data).text(), f"is signed by {THEIRS.fingerprint}, trusted is {OURS.fingerprint}"),
        (OURS.sign(data).text().replace(OURS.fingerprint.encode(), THEIRS.fingerprint.encode()), "is signed by"),
        (THEIRS.sign(data).text().replace(THEIRS.fingerprint.encode(), OURS.fingerprint.encode()), "was changed after"),
    ):
        (signed / "manifest.json.sig").write_bytes(signature)
        with pytest.raises(NotTrusted, match=rf"signed/manifest\.json: {said}"):
            Bundle.open(signed, TRUSTED)
    (signed / "manifest.json.sig").unlink()
    with pytest.raises(NotTrusted, match=r"signed/manifest\.json: is not signed.*pkd-export --sign"):
        Bundle.open(signed, TRUSTED)


def test_the_signature_of_another_bundle_or_of_another_file_is_refused(signed: Path) -> None:
    files, manifest = content()
    other = write_bundle(signed.parent / "other", files, manifest.model_copy(update={"licence": "other"}), key=OURS)
    assert other.signature
    evidence = OURS.sign(next((signed / "certificates").iterdir()).read_bytes())
    for signature in (other.signature, evidence):
        (signed / "manifest.json.sig").write_bytes(signature.text())
        refused(signed, r"manifest\.json: was changed after", NotTrusted, TRUSTED)


def test_an_older_bundle_of_the_same_key_is_authentic(signed: Path) -> None:
    """What a signature cannot say; docs/bundle.md does. A change of this has to change that page."""
    files, manifest = content()
    older = manifest.model_copy(update={"created": "2020-01-01T00:00:00+00:00"})
    Bundle.open(write_bundle(signed.parent / "older", files, older, key=OURS).path, TRUSTED)
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
    assert "not say that it is the newest" in page


@pytest.mark.parametrize("text", [b"", b"x" * 5000, b"ed25519 sha256:00\n"])
def test_a_signature_file_that_is_none_is_refused_without_a_key_too(signed: Path, text: bytes) -> None:
    (signed / "manifest.json.sig").write_bytes(text)
    with pytest.raises((NotTrusted, BundleError), match=r"manifest\.json\.sig: "):
        Bundle.open(signed)
    assert failed(signed)


def test_a_signature_is_no_part_of_older_schemas_nor_of_the_list(signed: Path) -> None:
    rewrite(signed, schema_version=2)
    refused(signed, r"manifest\.json\.sig: not listed")
    rewrite(signed, schema_version=3)
    for name in ("manifest.json", "manifest.json.sig"):
        files = json.loads((signed / "manifest.json").read_text())["files"]
        rewrite(signed, files={**files, name: hashlib.sha256((signed / name).read_bytes()).hexdigest()})
        refused(signed, rf"lists {re.escape(name)}")
        rewrite(signed, files=files)


def test_what_nobody_trusted_signed_is_not_run(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (signed / "manifest.json.sig").unlink()
    monkeypatch.setattr("pkd.toolkit.verification.open_bundle", lambda bundle: pytest.fail("it was loaded"))
    (golden,) = (c for c in verify(signed, TRUSTED).checks if c.question == "reproduces its golden embeddings")
    assert golden.result == "not checked" and "not run" in golden.detail


# The manifest


def test_a_key_that_stands_twice_is_refused(signed: Path) -> None:
    text = (signed / "manifest.json").read_text()
    for twice in ('"licence": "MIT",\n  "licence"', '"licence": "MIT",\n  "licen\\u0063e"'):
        (signed / "manifest.json").write_text(text.replace('"licence"', twice))
        refused(signed, r"manifest\.json: has 'licence' twice")
    line = next(line for line in text.splitlines() if '"encoder.onnx":' in line)
    (signed / "manifest.json").write_text(text.replace(line, f"{line.rstrip(',')},\n{line}"))
    refused(signed, r"manifest\.json: has 'encoder\.onnx' twice")


def test_a_manifest_of_a_hundred_thousand_equal_keys_is_refused_at_once(signed: Path) -> None:
    (signed / "manifest.json").write_text("{" + ",".join(['"a":1'] * 100_000) + "}")
    refused(signed, r"manifest\.json: has 'a' twice")


# Sizes


def test_too_many_too_large_and_together_too_large(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small limits; the files are real."""
    monkeypatch.setattr(bundle_folder, "MAX_BUNDLE", 5000)
    refused(signed, r"signed: its files have .* over the limit of 5,000 \(largest: golden\.npz\)")
    monkeypatch.setattr(bundle_folder, "MAX_FILE", 5000)
    refused(signed, r"signed/(golden\.npz|encoder\.onnx): has .* over the limit of 5,000")
    monkeypatch.setattr(bundle_folder, "MAX_FILES", 3)
    refused(signed, r"signed: holds more than 3 files")


def test_a_sparse_file_beyond_the_limit_is_refused_unread(signed: Path) -> None:
    with (signed / "encoder.onnx").open("r+b") as file:
        file.truncate(bundle_folder.MAX_FILE + 1)
    refused(signed, r"encoder\.onnx: has 2,147,483,649 bytes")


def test_a_golden_array_that_declares_more_than_it_holds_is_refused_before_memory_is_taken(signed: Path) -> None:
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as parts:
        parts.writestr("crops.npy", array.getvalue())
        parts.writestr("embeddings.npy", b"")
    replace_file(signed, "golden.npz", packed.getvalue())
    refused(signed, r"golden\.npz: crops\.npy declares 1,000,000,000,000 bytes")


# Graphs


def graph(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    """A graph that looks like a bundle's from outside; ``nodes`` make a scalar ``extra`` that is added."""
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["crops"], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=0),
                helper.make_node("Concat", ["mean"] * 6, ["wide"], axis=1),
                helper.make_node("Slice", ["wide", "from", "to", "axis"], ["narrow"]),
                *nodes,
                helper.make_node("Add", ["narrow", "extra"], ["embedding"]),
            ],
            "attack",
            [helper.make_tensor_value_info("crops", TensorProto.UINT8, ["n", 112, 112, 3])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 16])],
            [integers("axes", 1, 2), integers("from", 0), integers("to", 16), integers("axis", 1), *tensors],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def integers(name: str, *values: int) -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def declared(*dims: int, name: str = "big", raw: bytes = b"") -> TensorProto:
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, raw_data=raw)


def outside(location: str) -> TensorProto:
    tensor = TensorProto(name="big", data_type=TensorProto.UINT8, dims=[10], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("length", "10")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def summed() -> tuple[onnx.NodeProto, ...]:
    return (
        helper.make_node("Cast", ["big"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["cast"], ["extra"], keepdims=0),
    )


def in_a_branch(tensor: TensorProto) -> onnx.ModelProto:
    tensor.name = "value"
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["out"], value=tensor)],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    return graph(helper.make_node("If", ["yes"], ["extra"], then_branch=branch, else_branch=branch), tensors=(yes,))


def in_a_function(tensor: TensorProto) -> onnx.ModelProto:
    model = graph(helper.make_node("F", [], ["extra"], domain="d"))
    node = helper.make_node("Constant", [], ["out"], value=tensor)
    model.functions.append(helper.make_function("d", "F", [], ["out"], [node], [helper.make_opsetid("", 18)]))
    model.opset_import.append(helper.make_opsetid("d", 1))
    return model


def sparse() -> onnx.ModelProto:
    model = graph(*summed())
    values = helper.make_tensor("big", TensorProto.FLOAT, [1], [1.0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, integers("", 0), [10**6, 10**5]))
    return model


def twice() -> bytes:
    """One attribute of two tensors: protobuf merges them, so their shapes follow one another."""
    half = declared(1000, raw=bytes(4000)).SerializeToString()
    attribute = helper.make_attribute("value", declared(1000, raw=bytes(4000)))
    merged = attribute.SerializeToString() + b"\x2a" + varint(len(half)) + half
    again = onnx.AttributeProto.FromString(merged)
    assert list(again.t.dims) == [1000, 1000]
    node = helper.make_node("Constant", [], ["extra"]).SerializeToString()
    node += b"\x2a" + varint(len(merged)) + merged
    inner = b"\x0a" + varint(len(node)) + node
    return b"\x3a" + varint(len(inner)) + inner


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def nested(depth: int) -> bytes:
    """Attributes in nodes in graphs in attributes."""
    data = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            data = tag + varint(len(data)) + data
    return b"\x3a" + varint(len(data)) + data


LIES: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "no data": (lambda: graph(*summed(), tensors=(declared(10**6, 10**6),)), "'big' declares more elements"),
    "little data": (lambda: graph(*summed(), tensors=(declared(10**12, raw=b"1234"),)), "'big' declares more"),
    "overflow": (lambda: graph(*summed(), tensors=(declared(2**40, 2**40),)), "'big' declares more"),
    "negative": (lambda: graph(*summed(), tensors=(declared(-1),)), "'big' declares more"),
    "in a branch": (lambda: in_a_branch(declared(10**12)), "'value' declares more"),
    "in a function": (lambda: in_a_function(declared(10**12)), "'big' declares more"),
    "merged": (twice, "one attribute two tensors"),
    "sparse": (sparse, "sparse tensor"),
    "absolute": (lambda: graph(*summed(), tensors=(outside("/etc/passwd"),)), "'big' in another file"),
    "upwards": (lambda: graph(*summed(), tensors=(outside("../x"),)), "'big' in another file"),
    "beside": (lambda: graph(*summed(), tensors=(outside("secret"),)), "'big' in another file"),
    "outside in a branch": (lambda: in_a_branch(outside("secret")), "'value' in another file"),
    "deep": (lambda: nested(1000), "nests graphs"),
    "cut": (lambda: graph(*summed()).SerializeToString()[:-3], "ends too early"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_graph_that_lies_about_its_tensors_is_refused_unloaded(tmp_path: Path, name: str) -> None:
    make, said = LIES[name]
    made = make()
    path = bundle(tmp_path).path
    data = made if isinstance(made, bytes) else made.SerializeToString()
    replace_file(path, "encoder.onnx", data)
    refused(path, rf"bundle/encoder\.onnx: .*{said}")
    replace_file(path, "encoder.onnx", content()[0]["encoder.onnx"])
    Bundle.open(path)
    (path / "targets").mkdir()
    replace_file(path, "targets/onnxruntime-int8/graph.onnx", data)
    refused(path, rf"targets/onnxruntime-int8/graph\.onnx: .*{said}")


def test_every_way_to_a_tensor_is_known() -> None:
    """The table of field numbers, against the definition that onnx carries."""
    kinds = {"TensorProto": "tensor", "SparseTensorProto": "sparse"}
    for name in ("Model", "TrainingInfo", "Function", "Graph", "Node", "Attribute"):
        kinds[f"{name}Proto"] = name.lower().removesuffix("info")
    ways = {
        kinds[name]: {
            field.number: kinds[field.message_type.name]
            for field in getattr(onnx, name).DESCRIPTOR.fields
            if field.message_type is not None and field.message_type.name in kinds
        }
        for name in kinds
        if name not in ("TensorProto", "SparseTensorProto")
    }
    assert ways == onnx_file.INSIDE
    numbers = {field.name: field.number for field in TensorProto.DESCRIPTOR.fields}
    assert numbers["data_type"] == onnx_file.TENSOR_TYPE and numbers["name"] == onnx_file.TENSOR_NAME
    assert numbers["external_data"] == onnx_file.TENSOR_EXTERNAL and numbers["dims"] == onnx_file.TENSOR_DIMS
    assert numbers["data_location"] == onnx_file.TENSOR_LOCATION
    assert {number for name, number in numbers.items() if name.endswith("_data")} == (
        onnx_file.TENSOR_NUMBERS | {onnx_file.TENSOR_EXTERNAL}
    )
    kinds_of_numbers = dict(TensorProto.DataType.items())
    for name, share in {"UINT4": 2, "INT4": 2, "FLOAT4E2M1": 2, "UINT2": 4, "INT2": 4}.items():
        assert name not in kinds_of_numbers or onnx_file.PACKED[kinds_of_numbers[name]] == share


def test_a_tag_of_which_parsers_drop_the_upper_bits_hides_nothing() -> None:
    data = graph(*summed(), tensors=(outside("secret"),)).SerializeToString()
    tag = data.index(b"\x3a")  # model.graph
    hidden = data[:tag] + b"\xba\x80\x80\x80\x10" + data[tag + 1 :]
    with pytest.raises(BundleError, match=r"x\.onnx: is no ONNX file"):
        check_onnx(hidden, "x.onnx")


def test_onnxruntime_would_read_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why references to other files are refused here: the case above is a real one."""
    from pkd.toolkit.runtime import make_session

    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(b"0123456789")
    session = make_session(graph(*summed(), tensors=(outside("secret"),)).SerializeToString(), 1)
    (row,) = session.run(None, {"crops": np.zeros((1, 112, 112, 3), np.uint8)})[0]
    assert row[0] == sum(b"0123456789")


def test_more_parts_than_any_encoder_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_PARTS", 1000)
    with pytest.raises(BundleError, match=r"x\.onnx: has more than 1,000 parts"):
        check_onnx(b"\x08\x08" * 1001, "x.onnx")
    with pytest.raises(BundleError, match=r"x\.onnx: has more than 1,000 parts"):
        packed = TensorProto(dims=[1] * 2000).SerializeToString()
        inner = b"\x2a" + varint(len(packed)) + packed
        check_onnx(b"\x3a" + varint(len(inner)) + inner, "x.onnx")


@given(data=st.binary(max_size=300), cut=st.integers(0, 3000))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_judged_without_a_stumble(data: bytes, cut: int) -> None:
    real = content()[0]["encoder.onnx"]
    for made in (data, real[:cut] + data, real[:cut] + data + real[cut:]):
        try:
            check_onnx(made, "x.onnx")
        except BundleError as error:
            assert str(error).startswith("x.onnx: ")


SWELLS = """
import resource, sys
from pathlib import Path
from pkd.toolkit.verification import verify
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
(failure,) = verify(Path(sys.argv[1]), None).failures
print(failure.file, failure.detail, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_a_graph_that_swells_when_it_runs_is_stopped(tmp_path: Path) -> None:
    """Eight gigabytes of zeros, made of nothing. In a process of its own, in case it is not."""
    nodes = (helper.make_node("ConstantOfShape", ["shape"], ["big"]), *summed())
    data = graph(*nodes, tensors=(integers("shape", 2 << 30),)).SerializeToString()
    path = bundle(tmp_path).path
    replace_file(path, "encoder.onnx", data)
    done = subprocess.run([sys.executable, "-c", SWELLS, str(path)], capture_output=True, text=True, check=True)
    file, *_, megabytes = done.stdout.split()
    assert file == "encoder.onnx" and "does not run on its golden crops" in done.stdout, done.stdout
    assert int(megabytes) < 1000


OPENVINO = """<?xml version="1.0"?><net name="m" version="11"><layers>
<layer id="0" name="c" type="Const" version="opset1">
<data element_type="f32" shape="1000000,1000000" offset="0" size="4000000000000"/>
<output><port id="0" precision="FP32"><dim>1000000</dim><dim>1000000</dim></port></output></layer>
<layer id="1" name="r" type="Result" version="opset1">
<input><port id="0" precision="FP32"><dim>1000000</dim><dim>1000000</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


@pytest.mark.parametrize("text", [OPENVINO, "<net", ""])
def test_an_openvino_model_that_lies_is_a_failed_check(tmp_path: Path, text: str) -> None:
    pytest.importorskip("openvino")
    files, manifest = content()
    folder = "targets/openvino-fp32"
    target = Target(
        runtime="openvino",
        precision="fp32",
        encoder=manifest.encoder,
        graph="encoder.onnx",
        file=f"{folder}/encoder.xml",
        golden_tolerance=1e-5,
        checked_with="x",
        made_with="x",
    )
    more = {f"{folder}/encoder.xml": text.encode(), f"{folder}/encoder.bin": bytes(16)}
    made = write_bundle(tmp_path / "b", {**files, **more}, manifest.model_copy(update={"targets": (target,)}))
    (failure,) = failed(made.path)
    assert failure.file == folder and "encoder.xml: openvino cannot load it" in failure.detail


# Zips


def zipped(path: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], object]) -> Path:
    """The bundle at ``path`` as an attacker would pack it: ``change`` writes what it likes."""
    made = path.parent / "made.zip"
    files = {name: (path / name).read_bytes() for name in bundle_folder.list_files(path)}
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w") as archive:
        warnings.simplefilter("ignore")
        change(archive, files)
        for name, data in files.items():
            archive.writestr(name, data)
    return made


def entry(name: str, mode: int = 0, packing: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x", bundle_zip.EPOCH)
    info.filename, info.external_attr, info.compress_type = name, mode << 16, packing
    return info


def test_a_zip_is_the_bundle_and_the_same_bundle_gives_the_same_bytes(signed: Path) -> None:
    opened = Bundle.open(signed, TRUSTED)
    made = opened.pack(zip_path(signed))
    assert made == signed.with_name("signed.zip")
    again = Bundle.open(made, TRUSTED)
    assert (again.manifest, again.signature, again.data) == (opened.manifest, opened.signature, opened.data)
    assert [file.data for file in again.certificate_files()] == [file.data for file in opened.certificate_files()]
    assert not verify(made, TRUSTED).failures
    assert open_encoder(str(made)).info == opened.manifest.encoder
    copy = Path(shutil.copytree(signed, signed.parent / "copy"))
    (copy / "golden.npz").touch()
    assert Bundle.open(copy).pack(copy.with_name("copy.zip")).read_bytes() == made.read_bytes()
    assert again.pack(signed.parent / "again.zip").read_bytes() == made.read_bytes()


def test_a_target_is_found_in_a_zip(tmp_path: Path) -> None:
    files, manifest = content()
    target = Target(
        runtime="onnxruntime",
        precision="fp32",
        encoder=manifest.encoder,
        graph="encoder.onnx",
        file="encoder.onnx",
        golden_tolerance=1e-5,
        checked_with="x",
        made_with="x",
    )
    opened = write_bundle(tmp_path / "b", files, manifest.model_copy(update={"targets": (target,)}))
    made = opened.pack(tmp_path / "b.zip")
    assert open_encoder(str(made / "targets/onnxruntime-fp32")).info == manifest.encoder
    assert not verify(made, None).failures


def test_a_zip_is_written_whole_or_not_at_all(signed: Path) -> None:
    opened, before = Bundle.open(signed), sorted(signed.parent.iterdir())
    (signed / "golden.npz").write_bytes(b"changed since")
    with pytest.raises(BundleError, match=r"golden\.npz: its SHA-256"):
        opened.pack(signed.with_name("signed.zip"))
    assert sorted(signed.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "C:x", ".hidden", "a\0b", "a//b"])
def test_a_name_in_a_zip_that_leads_out_is_refused(signed: Path, name: str) -> None:
    made = zipped(signed, lambda archive, files: archive.writestr(entry(name), b"x"))
    refused(made, re.escape(repr(name)))


def test_links_doubles_and_strange_packing_in_a_zip_are_refused(signed: Path) -> None:
    for mode in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        made = zipped(signed, lambda archive, files, mode=mode: archive.writestr(entry("x", mode | 0o777), b"/etc"))
        refused(made, r"made\.zip/x: is a link or a special file")
    made = zipped(signed, lambda archive, files: archive.writestr(entry("encoder.onnx"), b"other"))
    refused(made, r"made\.zip/encoder\.onnx: is in the archive twice")
    made = zipped(signed, lambda archive, files: archive.writestr(entry("x", packing=zipfile.ZIP_BZIP2), b"other"))
    refused(made, r"made\.zip/x: is encrypted, or packed")
    made = Bundle.open(signed).pack(signed.parent / "made.zip")
    data = bytearray(made.read_bytes())
    directory = int.from_bytes(data[-6:-2], "little")
    data[directory + 8] |= 1  # the first entry is said to be encrypted
    made.write_bytes(data)
    refused(made, r"made\.zip/certificates/.*\.json: is encrypted, or packed")
    made = zipped(signed, lambda archive, files: files.update({"notes.txt": b"x"}))
    refused(made, r"made\.zip/notes\.txt: not listed")
    made = zipped(signed, lambda archive, files: files.pop("golden.npz"))
    refused(made, r"made\.zip/golden\.npz: is not in the archive")
    made = zipped(signed, lambda archive, files: files.pop("manifest.json"))
    refused(made, r"made\.zip: not a bundle, it has no manifest\.json")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_folder, "MAX_BUNDLE", 10 << 20)
    zeros = bytes(4 << 20)

    def bomb(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
        for number in range(3):
            archive.writestr(entry(f"zeros{number}", packing=zipfile.ZIP_DEFLATED), zeros)

    made = zipped(signed, bomb)
    assert made.stat().st_size < 200_000
    refused(made, r"made\.zip: its files have .* bytes, over the limit of 10,485,760 \(largest: zeros0\)")
    monkeypatch.setattr(bundle_folder, "MAX_FILE", 1 << 20)
    refused(made, r"made\.zip/zeros0: has 4,194,304 bytes")


def test_a_zip_that_lies_about_its_sizes_is_refused(signed: Path) -> None:
    """The list says four bytes, the content unpacks to more: no more than four are read, and they do not fit."""
    made = zipped(
        signed,
        lambda archive, files: archive.writestr(
            entry("certificates/x.json", packing=zipfile.ZIP_DEFLATED), bytes(9999)
        ),
    )
    data = made.read_bytes()
    made.write_bytes(data.replace((9999).to_bytes(4, "little"), (4).to_bytes(4, "little")))
    with pytest.raises(BundleError, match=r"made\.zip"):
        bundle_zip.read_zip(made, "certificates/x.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "is no zip archive"),
        (lambda data: b"x" * 100, "is no zip archive"),
        (lambda data: data[:-1], "is no zip archive"),
        (lambda data: data + b"x", "is no zip archive"),
        (lambda data: data[:-22] + b"PK\6\7" + bytes(16) + data[-22:], "lists more than a bundle may hold"),
        (lambda data: data[:-14] + b"\xff\xff\xff\xff" + data[-10:], "lists more than"),
        (lambda data: data[: len(data) // 2] + data[-22:], "cannot be read as a zip"),
    ],
)
def test_a_zip_that_is_none_is_refused(signed: Path, change: Callable[[bytes], bytes], said: str) -> None:
    made = Bundle.open(signed).pack(signed.with_name("signed.zip"))
    made.write_bytes(change(made.read_bytes()))
    refused(made, rf"signed\.zip: {said}")


@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_of_a_signed_zip_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    """Some bytes of a zip say nothing, as the time of a file; what opens is always what was signed."""
    files, manifest = content()
    folder = tmp_path_factory.mktemp("flips")
    signed = write_bundle(folder / "b", files, manifest, key=OURS)
    made = signed.pack(folder / "b.zip")
    data = bytearray(made.read_bytes())
    for place, value in flips:
        data[place % len(data)] ^= value
    made.write_bytes(data)
    try:
        opened = Bundle.open(made, TRUSTED)
    except (BundleError, NotTrusted) as error:
        assert "b.zip" in str(error) and "\n" not in str(error)
    else:
        assert opened.data == signed.data
        assert {name: opened.read(name) for name in opened.manifest.files} == files
