"""Adopted networks are cut where one tensor is alive."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch

from pkd.toolkit.distill.models.adopted import Adopted, adopt
from pkd.toolkit.distill.models.cutting import choose_cut
from tests.support.training_data import SIZE
from tests.unit.toolkit.distill.models.test_adopted import Graph, f, torch_old

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
