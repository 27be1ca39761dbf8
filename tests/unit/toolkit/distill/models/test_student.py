"""TorchEncoder and the student file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.student import TorchEncoder, load_student, save_student, weights_digest

BACKBONE = "mobilefacenet:0.25"
CROPS = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)


def make(seed: int = 0) -> TorchEncoder:
    torch.manual_seed(seed)
    network = build(BACKBONE, 32)
    info = describe("tiny", "student", weights_digest(network.state_dict()), Preprocess(), 32)
    return TorchEncoder(info, network, {"method": "l2kd", "steps": 3})


def test_embeddings_are_unit_and_do_not_depend_on_the_batch() -> None:
    encoder = make()
    together = encoder.embed(CROPS)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.embed(CROPS[1:2])[0], together[1], atol=1e-5)
    assert encoder.embed(CROPS[:0]).shape == (0, 32)


def test_a_parents_train_call_changes_nothing() -> None:
    encoder = make()
    before = encoder.embed(CROPS)
    buffers = weights_digest(encoder.module.state_dict())
    torch.nn.ModuleList([encoder.module]).train()
    np.testing.assert_array_equal(encoder.embed(CROPS), before)
    assert weights_digest(encoder.module.state_dict()) == buffers
    assert not any(p.requires_grad for p in encoder.module.parameters())


def test_the_file_gives_the_same_encoder_back(tmp_path: Path) -> None:
    encoder = make()
    save_student(tmp_path, encoder.module, BACKBONE, encoder.info, encoder.training)
    for given in (tmp_path, tmp_path / "student.pt"):
        read = load_student(given)
        assert read.info == encoder.info and read.training == encoder.training
        np.testing.assert_array_equal(read.embed(CROPS), encoder.embed(CROPS))


def test_the_digest_sees_every_weight() -> None:
    a, b = make(0), make(0)
    assert weights_digest(a.module.state_dict()) == weights_digest(b.module.state_dict())
    next(iter(b.module.buffers()))[0] += 1e-3
    assert weights_digest(a.module.state_dict()) != weights_digest(b.module.state_dict())


def test_files_that_are_no_student(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no student\.pt"):
        load_student(tmp_path)
    (tmp_path / "student.pt").write_bytes(b"not a zip")
    with pytest.raises(InputError, match="no checkpoint"):
        load_student(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "student.pt")
    with pytest.raises(InputError, match="not a student"):
        load_student(tmp_path)
    torch.save([1, 2], tmp_path / "student.pt")
    with pytest.raises(InputError, match="expected a dictionary"):
        load_student(tmp_path)
