"""Preprocessing is parsed, written and applied as stated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess


def test_the_formula_in_float64() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    made = Preprocess(channels="bgr", mean=100.0, std=50.0)(crops)
    expected = (crops.astype(np.float64)[..., ::-1].transpose(0, 3, 1, 2) - 100) / 50
    assert made.dtype == np.float32
    assert made.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_rgb_and_bgr_differ_in_order_only() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (1, 112, 112, 3), np.uint8)
    np.testing.assert_array_equal(Preprocess()(crops), Preprocess(channels="bgr")(crops)[:, ::-1])


@pytest.mark.parametrize(
    "crops",
    [
        np.zeros((112, 112, 3), np.uint8),
        np.zeros((1, 112, 112, 3), np.float32),
        np.zeros((1, 3, 112, 112), np.uint8),
        np.zeros((1, 112, 112, 1), np.uint8),
        np.zeros((1, 96, 112, 3), np.uint8),
    ],
)
def test_other_shapes_and_types_are_refused(crops: np.ndarray) -> None:
    with pytest.raises(InputError, match="this encoder takes uint8 N×112×112×3 RGB"):
        Preprocess()(crops)


def test_fields_and_file_mean_the_same(tmp_path: Path) -> None:
    made = Preprocess.parse("channels=bgr, mean=0, std=1,size=96")
    (tmp_path / "p.json").write_text(made.model_dump_json())
    assert Preprocess.parse(str(tmp_path / "p.json")) == made
    assert (made.channels, made.mean, made.std, made.size, made.name) == ("bgr", 0.0, 1.0, 96, "arcface5pt-96-bgr")


@pytest.mark.parametrize(
    "spec",
    ["std=0", "size=4", "mean=x", "channels=rbg", "colour=red", "mean", "mean=nan", "std=inf", "", "=", "mean=1,mean"],
)
def test_bad_specs_are_one_line_with_an_example(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        Preprocess.parse(spec)
    assert "\n" not in str(caught.value)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", '{"mean": "x"}', '{"unknown": 1}', "{", '{"std": 0}'])
def test_bad_files_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(InputError) as caught:
        Preprocess.parse(str(tmp_path / "p.json"))
    assert "\n" not in str(caught.value)


def test_digest_tells_settings_apart() -> None:
    kinds = [Preprocess(), Preprocess(channels="bgr"), Preprocess(mean=0), Preprocess(std=128), Preprocess(size=96)]
    assert len({one.digest() for one in kinds}) == len(kinds)
    assert Preprocess(mean=127.5).digest() == Preprocess().digest()


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("mean=0.5,std=0.5", r"-1 to 509.*mean=127\.5,std=127\.5"),
        ("mean=0.485,0.456,0.406,std=0.229,0.224,0.225", r"mean=123\.675,116\.28,103\.53,std=58\.395"),
        ("mean=0.5,std=1", r"mean=127\.5,std=255"),
        ("mean=0.5,std=255", "for pixels of 0 to 1"),
        ("mean=127.5,std=0.5", "for pixels of 0 to 1"),
        ("mean=127.5,std=0.0078125", "std=128"),
        ("mean=0,std=0.00392157", "std=255"),
        ("mean=127.5,std=-127.5", "above 0"),
        ("mean=-127.5,std=1", "units of pixels"),
        ("mean=0,std=65535", "units of pixels"),
    ],
)
def test_scaling_that_cannot_be_meant_is_refused_with_what_is_seen(stated: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Preprocess.parse(stated)
    assert "the network would see" in str(caught.value)


@pytest.mark.parametrize("stated", ["mean=0,std=1", "mean=0,std=255", "mean=127.5,std=128", "mean=131,104,91,std=1"])
def test_scalings_in_use_are_taken(stated: str) -> None:
    Preprocess.parse(stated)
