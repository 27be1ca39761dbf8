"""Adopted networks are cut where one tensor is alive, and kept short under a new head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.adopted import Adopted, adopt
from pkd.toolkit.distill.models.backbones import parameters
from pkd.toolkit.distill.models.cutting import choose_cut, shorten
from tests.support.training_data import SIZE
from tests.unit.toolkit.distill.models.test_adopted import CROPS, Graph, f, torch_old

STATED = f"mean=127.5,std=127.5,size={SIZE},template=none"


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Adopted:
    file = tmp_path_factory.mktemp("cutting") / "mobile.onnx"
    torch_old(file)
    return adopt(str(file), STATED)


def with_shortcut(path: Path) -> Path:
    """Write a graph whose second convolution is bridged: there is no single tensor to cut at inside."""
    g = Graph()
    g.add("Conv", f(6, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    before = g.add("Relu")
    g.add("Conv", f(6, 6, 3, 3), pads=[1, 1, 1, 1])
    g.add("Relu")
    g.add("Add", inputs=(g.end, before))
    g.add("Conv", f(9, 6, 1, 1))
    g.add("GlobalAveragePool")
    g.add("Flatten")
    g.save(path, 1, [9], 13)
    return path


def test_a_network_is_cut_only_where_one_tensor_is_alive(tmp_path: Path) -> None:
    network = adopt(str(with_shortcut(tmp_path / "s.onnx")), STATED).network(9).eval()
    steps = list(network.trunk.step_names)
    cuts = [steps.index(name) for name in network.trunk.cuts()]
    assert cuts == [0, 1, *range(4, len(steps))]
    pixels = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        whole = network(pixels)
        for name, tensor in network.trunk.cuts().items():
            part: list[torch.Tensor] = []
            hook = getattr(network.trunk, name).register_forward_hook(lambda *seen, part=part: part.append(seen[2]))
            network(pixels)
            hook.remove()
            network.freeze(name)
            torch.testing.assert_close(network(part[0], features=True), whole, msg=f"{name} {tensor}")


def test_the_cut_leaves_at_least_what_was_asked_for_to_train(mobile: Adopted) -> None:
    network = mobile.network(16)
    asked = (0.76, 0.9, 0.99)
    cuts = [choose_cut(network, share) for share in asked]
    shares = [cut.share for cut in cuts if cut is not None]
    assert all(found <= limit for found, limit in zip(shares, asked, strict=True))
    assert shares == sorted(set(shares))
    assert choose_cut(network, 0.1) is None


def test_a_short_student_keeps_the_first_layers_and_has_a_head_that_torch_and_onnxruntime_agree_on(
    mobile: Adopted,
) -> None:
    short = shorten(mobile, 0.8)
    whole, network = mobile.network(16).eval(), short.network(16).eval()
    cut = choose_cut(whole, 0.8)
    assert cut is not None and short.width == 2 * cut.shape[0]
    pixels = torch.from_numpy(mobile.info.preprocess(CROPS))
    seen: list[torch.Tensor] = []
    for each in (whole, network):
        getattr(each.trunk, cut.step).register_forward_hook(lambda *given: seen.append(given[2]))
        with torch.no_grad():
            each(pixels)
    torch.testing.assert_close(seen[0], seen[1])
    with torch.no_grad():
        rows = network.flatten(network.trunk(pixels)).numpy()
    np.testing.assert_allclose(short.features.embed(CROPS), rows, rtol=1e-4, atol=1e-5)
    assert short.features.info.id != mobile.features.info.id  # or one's stored features were taken for the other's
    assert shorten(mobile, 0.8, seed=1).features.info.id != short.features.info.id


def test_the_head_is_what_its_docstring_says(mobile: Adopted) -> None:
    short = shorten(mobile, 0.8)
    stem = 8 * 3 * 9 + 8 + 8  # convolution, bias, PReLU
    head = 8 * 9 + 8 + 16 * 8 + 16 + 16 * (SIZE // 4) ** 2
    assert parameters(short.network(16)) == stem + head + 16 * 16 + 16
    kinds = [node.op_type for node in short.trunk.graph.node]
    assert kinds[-5:] == ["Conv", "PRelu", "Conv", "PRelu", "Conv"]


def test_a_network_that_cannot_be_cut_there_is_refused(mobile: Adopted, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Keep more"):
        shorten(mobile, 0.1)
    g = Graph()
    g.add("Conv", f(6, 3, 16, 16), strides=[16, 16])
    g.add("Relu")
    g.add("Conv", f(9, 6, 1, 1))
    g.add("GlobalAveragePool")
    g.add("Flatten")
    g.save(tmp_path / "coarse.onnx", 1, [9], 13)
    with pytest.raises(InputError, match=r"only 2×2 positions are left there\. Keep less"):
        shorten(adopt(str(tmp_path / "coarse.onnx"), STATED), 0.999)
