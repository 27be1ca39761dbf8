"""A server's own attack detector: a real classifier, trained here on made-up pictures, measured and obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pkd.serving.cli.serve import make_serve_parser
from pkd.serving.core.errors import NotLive
from pkd.serving.matching.liveness import Demand, require_measured
from pkd.serving.matching.policies import Policies
from pkd.serving.server.config import configure
from pkd.toolkit.certificates.attack_detection import AttackCertificate, Scoring, read_attack_certificate
from pkd.toolkit.certificates.signing import TrustedKeys, new_key
from pkd.toolkit.cli import pad
from pkd.toolkit.core.errors import BundleError, InputError, NotTrusted
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.attack_detector import AttackDetector, AttackModel
from pkd.toolkit.evaluation.metrics.attack_rates import Presentations, choose_threshold, rate_of
from pkd.toolkit.images.codec import Rgb
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import ALIGNED, PNG, problem

PEOPLE, IMAGES = 12, 3
PREPROCESS = "size=112,mean=127.5,std=127.5"
AXES = {"first": np.array(0, np.int64), "last": np.array([1], np.int64)}
RULES = {
    "live": {"liveness": {"enrol": True, "query": True}},
    "proven": {"liveness": {"enrol": True, "max_apcer": 0.001}},
}


def picture(person: int, image: int, species: str = "") -> Rgb:
    """Draw a smooth pattern; a print of it has a raster, a screen has stripes. uint8 112×112×3."""
    rng = np.random.default_rng([person, image])
    small = rng.integers(60, 190, (5, 5, 3)).astype(np.uint8)
    smooth = cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    smooth += rng.normal(0, 2, smooth.shape)
    y, x = np.mgrid[:112, :112]
    raster = {"": 0 * x, "print": 30 * (((x // 2) + (y // 2)) % 2), "screen": 22 * (x % 3 == 0)}[species]
    return np.clip(smooth + raster[..., None] - raster.mean(), 0, 255).astype(np.uint8)


def trained(train: dict[int, list[Rgb]]) -> bytes:
    """Fit a logistic regression on how strong edges are, as ONNX: N×3×112×112 → logits of (attack, bona fide)."""
    kernels = np.zeros((2, 3, 3, 3), np.float32)
    kernels[0, :, 1] = kernels[1, :, :, 1] = np.array([-1, 2, -1], np.float32) / 6

    def features(crops: list[Rgb]) -> np.ndarray:
        pixels = (np.stack(crops).astype(np.float32) - 127.5) / 127.5
        rows = [
            [np.abs(cv2.filter2D(crop.mean(2), -1, kernel[0] * 3))[1:-1, 1:-1].mean() for kernel in kernels]
            for crop in pixels
        ]
        return np.array(rows)

    x = np.concatenate([features(train[0]), features(train[1])])
    y = np.repeat([0.0, 1.0], [len(train[0]), len(train[1])])
    weights, bias = np.zeros(2), 0.0
    for _ in range(3000):
        off = 1 / (1 + np.exp(-(x @ weights + bias))) - y
        weights, bias = weights - 20 * x.T @ off / len(x), bias - 20 * off.mean()
    constants = {
        "kernels": kernels,
        "weights": np.stack([-weights / 2, weights / 2], 1).astype(np.float32),
        "bias": np.array([-bias / 2, bias / 2], np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "kernels"], ["edges"]),
        helper.make_node("Abs", ["edges"], ["strong"]),
        helper.make_node("GlobalAveragePool", ["strong"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
    ]
    taken = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, 112, 112])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])
    graph = helper.make_graph(
        nodes, "pad", [taken], [given], [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@dataclass
class Measured:
    """Hold a trained model, what it was measured on, and its certificate."""

    folder: Path
    model: Path
    certificate: Path

    def measure(self, out: Path, *more: str) -> int:
        """Run pkd-pad."""
        data = ("--data", str(self.folder / "data"), "--preprocess", PREPROCESS, "--out", str(out))
        return pad.main([str(self.model), *data, "--output", "1", "--softmax", *more])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("pad")
    others = range(1000, 1010)  # nobody of those it is measured on
    attacks = [picture(one, 0, species) for one in others for species in ("print", "screen")]
    model = folder / "detector.onnx"
    model.write_bytes(trained({0: attacks, 1: [picture(one, 0) for one in others]}))
    for species, below in (("", "bona-fide"), ("print", "attack/print"), ("screen", "attack/screen")):
        for person in range(PEOPLE):
            place = folder / "data" / below / f"p{person:02}"
            place.mkdir(parents=True)
            for image in range(IMAGES):
                (place / f"{image}.png").write_bytes(made.made.png(picture(person, image, species)))
    it = Measured(folder, model, folder / "detector.json")
    assert it.measure(it.certificate) == 0
    return it


@pytest.fixture(scope="module")
def server(fleet: Any, measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "policies.json").write_text(json.dumps(RULES))
    detector = AttackDetector(measured.model, read_attack_certificate(measured.certificate))
    policies = Policies(folder / "policies.json")
    with made.serving(fleet, folder / "store", policies=policies, attack_detector=detector) as client:
        for gallery in ("live", "proven", "free"):
            made.gallery(client, gallery)
        yield client


def enrol(client: httpx.Client, crop: Rgb, gallery: str = "live") -> httpx.Response:
    path = f"/v1/galleries/{gallery}/subjects/ann/templates"
    return client.post(path, content=made.made.png(crop), headers=PNG, params=ALIGNED)


def refused(answer: httpx.Response) -> str:
    return str(problem(answer, 422, "not-live")["reason"])


def test_the_certificate_states_rates_by_species_on_other_people(measured: Measured) -> None:
    found = read_attack_certificate(measured.certificate)
    assert set(found.attacks) == {"print", "screen"} and found.chosen_on == PEOPLE // 2
    for one in (*found.attacks.values(), found.bona_fide):
        assert (one.subjects, one.presentations) == (PEOPLE // 2, PEOPLE // 2 * IMAGES)
        assert one.ci95[0] <= one.rate <= one.ci95[1] and one.ci95[1] > 0.2  # six people prove little
    assert found.apcer <= 1 / 3 and found.bona_fide.rate <= 1 / 3
    assert found.apcer_at_most == max(one.ci95[1] for one in found.attacks.values())


def test_rates_are_those_of_the_standard() -> None:
    scores = np.array([0.9, 0.1, 0.2, 0.8], np.float32)
    people = np.array(["a", "a", "b", "b"])
    attacks = {"print": Presentations(scores, people), "mask": Presentations((scores / 2).astype(np.float32), people)}
    assert choose_threshold(attacks, 0.0) == float(np.nextafter(np.float32(0.9), np.float32(1)))
    assert choose_threshold(attacks, 0.25) == float(np.nextafter(np.float32(0.8), np.float32(1)))
    one = rate_of(scores >= 0.5, people)
    assert one.rate == 0.5 and one.ci95[0] < 0.2 and one.ci95[1] > 0.8
    assert rate_of(np.zeros(4, bool), people).ci95 == (0.0, pytest.approx(0.8418861, abs=1e-6))  # 1 − 0.025^(1/2)


def test_a_living_person_is_taken_and_an_attack_is_not(server: httpx.Client, fleet: Any) -> None:
    assert enrol(server, picture(1, 0)).status_code == 201
    for species in ("print", "screen"):
        assert refused(enrol(server, picture(1, 0, species))) == "attack"
        assert enrol(server, picture(1, 0, species), "free").status_code == 201  # nobody asked
    assert refused(enrol(server, picture(1, 0), "proven")) == "evidence"
    subject = {"gallery": "live", "subject": "ann"}
    for crop, species in ((picture(1, 1), ""), (picture(1, 1, "print"), "print")):
        answers = [
            server.post("/v1/verify", json={"a": made.file(crop), "b": subject}),
            server.post("/v1/galleries/live/identify", json={"query": made.file(crop), "partial": True}),
        ]
        for answer in answers:
            assert refused(answer) == "attack" if species else answer.status_code == 200, answer.text
    query = made.embedded(fleet.first, 1)  # nothing that a model could look at
    assert refused(server.post("/v1/galleries/live/subjects/bob/templates", json={"inputs": [query]})) == "missing"
    picture_alone = {"image_b64": made.file(picture(1, 0))["image_b64"]}
    mixed = {"inputs": [query, picture_alone], "aligned": True}
    assert refused(server.post("/v1/galleries/live/subjects/bob/templates", json=mixed)) == "missing"


def test_a_model_without_a_fitting_certificate_is_refused(measured: Measured, tmp_path: Path) -> None:
    certificate = read_attack_certificate(measured.certificate)
    other = tmp_path / "other.onnx"
    other.write_bytes(measured.model.read_bytes() + b"\x12\x01x")  # another producer's name: the same function
    with pytest.raises(InputError, match="Measure this file with pkd-pad"):
        AttackDetector(other, certificate)
    for changes, says in (
        ({"threshold": "high"}, "threshold"),
        ({"attacks": {}}, "attacks"),
        ({"bona_fide": {**certificate.bona_fide.model_dump(), "rate": 1.0, "ci95": [0.9, 1.0]}}, "chance"),
    ):
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(certificate.model_dump(mode="json") | changes))
        with pytest.raises(BundleError, match=says):
            read_attack_certificate(path)
    for given in (["--attack-detector", "a.onnx"], ["--attack-certificate", "a.json"]):
        with pytest.raises(InputError, match="Pass both"):
            configure(make_serve_parser().parse_args(["bundle", *given]), {})


def test_evidence_is_the_upper_end_of_the_interval(measured: Measured) -> None:
    certificate = read_attack_certificate(measured.certificate)
    between = (certificate.apcer + certificate.apcer_at_most) / 2
    with pytest.raises(NotLive, match="is possible by its certificate"):
        require_measured(certificate, Demand("staff", between))
    require_measured(certificate, Demand("staff", certificate.apcer_at_most))


def test_no_answer_of_the_model_is_an_attack(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
        helper.make_node("Sqrt", ["mean"], ["root"]),  # of dark pixels, which are negative here: not a number
        helper.make_node("Flatten", ["root"], ["scores"]),
    ]
    taken = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, 112, 112])
    given = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(nodes, "pad", [taken], [given])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (tmp_path / "nan.onnx").write_bytes(model.SerializeToString())
    scores = AttackModel(tmp_path / "nan.onnx", Scoring(preprocess=Preprocess.parse(PREPROCESS))).score(
        np.stack([np.zeros((112, 112, 3), np.uint8), np.full((112, 112, 3), 255, np.uint8)])
    )
    assert scores.tolist() == [-np.inf, 1.0]


def test_a_model_whose_scores_depend_on_their_batch_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["each"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("CumSum", ["each", "first"], ["sum"]),
        helper.make_node("Unsqueeze", ["sum", "last"], ["scores"]),
    ]
    taken = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, 112, 112])
    given = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 1])
    numbers = [numpy_helper.from_array(value, name) for name, value in AXES.items()]
    graph = helper.make_graph(nodes, "pad", [taken], [given], numbers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (tmp_path / "sums.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"depends on the others in its batch.*model\.eval\(\)"):
        AttackModel(tmp_path / "sums.onnx", Scoring(preprocess=Preprocess(mean=0), output=0, softmax=False))


def test_an_unsigned_certificate_is_refused_where_signatures_are_asked_for(measured: Measured, tmp_path: Path) -> None:
    public, _ = new_key(tmp_path / "key.pem")
    trusted = TrustedKeys.read([public])
    with pytest.raises(NotTrusted):
        read_attack_certificate(measured.certificate, trusted)
    assert measured.measure(tmp_path / "signed.json", "--sign", str(tmp_path / "key.pem")) == 0
    assert isinstance(read_attack_certificate(tmp_path / "signed.json", trusted), AttackCertificate)


def test_bad_input_is_one_line(measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, says in (
        (("--output", "7"), "none numbered 7"),
        (("--output", "0"), "no better than chance"),
        (("--data", str(tmp_path)), "expected bona-fide/SUBJECT/IMAGE"),
        (("--out", str(tmp_path / "gone" / "x.json")), "Make it first"),
    ):
        assert measured.measure(tmp_path / "x.json", *more) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert says in said[-1] and said[-1].startswith("pkd-pad: ")
