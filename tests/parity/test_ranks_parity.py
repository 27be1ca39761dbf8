"""Two ranks over gloo against one process: loss, embedding gradients, weights after a step; any split of the batch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from pkd.toolkit.core.errors import BadHead, InputError
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead, frozen_cross_entropy
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.training.distributed import SINGLE_PROCESS, DistributedContext, ShardedHead, join_processes
from pkd.toolkit.distill.training.setup import prepare
from pkd.toolkit.distill.training.trainer import Trainer
from tests.support.training_data import SIZE, make_pyramid, write_patterns

CLASSES, DIM = 301, 24
MARGIN = Margin.parse("arcface:0.5")


@dataclass(frozen=True)
class Case:
    """``sizes``: rows of the batch on each rank. ``labels``: of the whole batch."""

    name: str
    sizes: tuple[int, int]
    labels: tuple[int, ...]
    per_image: bool = False
    bf16: bool = False


CASES = [
    Case("even", (4, 4), (0, 300, 150, 151, 7, 200, 250, 33)),
    Case("duplicates", (4, 4), (9, 9, 200, 9, 9, 200, 200, 5)),
    Case("uneven", (7, 2), (0, 1, 2, 150, 149, 151, 300, 299, 9)),
    Case("empty", (3, 0), (0, 299, 4)),
    Case("first-half-alone", (3, 3), (0, 1, 2, 3, 4, 5)),
    Case("second-half-alone", (3, 3), (160, 170, 180, 190, 200, 210)),
    Case("unlabelled", (4, 2), (-1, 3, -1, 200, -1, 4)),
    Case("images", (3, 3), (148, 149, 150, 151, 152, 153), per_image=True),
    Case("bf16", (4, 4), (0, 300, 150, 151, 7, 200, 250, 33), bf16=True),
]


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Draw inputs, centres, labels and excluded ranges; a person's images lie on both sides of the split."""
    random = torch.Generator().manual_seed(3)
    centres = normalize(torch.randn(CLASSES, DIM, generator=random))
    labels = torch.tensor(case.labels)
    exclude = torch.tensor([[145, 156]] * len(labels)) if case.per_image else None
    inputs = torch.randn(len(labels), 10, generator=random)
    return inputs, centres.bfloat16() if case.bf16 else centres, labels, exclude


def student() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(10, DIM)


def loss_of(embeddings: Tensor, head: FrozenHead, labels: Tensor, exclude: Tensor | None) -> Tensor:
    """Compute a classification loss over the labelled images, and what kd asks: a sum over all classes."""
    known = labels >= 0
    picked = None if exclude is None else exclude[known]
    loss = frozen_cross_entropy(embeddings[known], head, labels[known], MARGIN, 64, exclude=picked)
    return loss + 0.1 * head.logsumexp(normalize(embeddings), 8.0)[0].mean()


METHODS = ("proxylesskd+l2kd:30", "none+rkd", "adadistill", "l2kd+at:10", "csd+infonce+raml")
NORMALISED = "l2kd+fitnets"
"""Its adapter has batch normalisation, whose statistics are a rank's own: close to one process, not equal."""


def trained(method: str, folder: Path, context: DistributedContext) -> dict[str, Tensor]:
    """Gradients and moved centres of a real trainer's second step; batch normalisation in eval mode."""
    config = DistillConfig(
        out=str(folder / "run"), faces=(str(folder / "faces"),), student="mobilefacenet-relu:0.125", batch=8,
        precision="fp32", threads=1, cache=str(folder / "cache"), teacher="pyramid", method=method, augment=0.3,
    )  # fmt: skip
    prepared = prepare(config, make_pyramid(), Console(quiet=True))
    trainer = Trainer(config, prepared, 16, SIZE, context)
    trainer.student.eval()
    losses = [trainer.step(batch, 1e-9)[0] for batch in trainer.loader.run(0, 2)]
    kept = {name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None}
    kept |= {f"adapters.{name}": p.grad for name, p in trainer.adapters.named_parameters() if p.grad is not None}
    kept["losses"] = torch.tensor(losses)
    if trainer.own is not None and trainer.own.grad is not None:
        kept["own"] = trainer.own.grad
    if trainer.ema_head is not None:
        kept["ema"] = trainer.ema_head.units
    return kept


def work(rank: int, port: int, folder: Path) -> None:
    """One rank: every case, and the refusals; results go to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found: dict[str, list[Tensor]] = {}
    with join_processes() as context:
        assert (context.rank, context.world, context.is_rank_zero) == (rank, 2, rank == 0)
        for case in CASES:
            found[case.name] = one_rank(case, context)
        for method in (*METHODS, NORMALISED):
            torch.save(trained(method, folder, context), folder / f"{method}.{rank}.pt")
        assert context.broadcast(f"rank {rank}") == "rank 0"
        assert context.mean(float(rank)) == 0.5 and context.any(rank == 1) and not context.any(False)
        assert context.batch_share(8) == slice(4 * rank, 4 * rank + 4)
        context.require_same("images", "equal")
        if rank == 0:
            context.require_same("images", "0")
        else:
            with pytest.raises(InputError, match="rank 1: its images"):
                context.require_same("images", "1")
        order: list[int] = []
        context.rank_zero_first(lambda: order.append(rank))
        assert order == [rank]
        layer = nn.Linear(2, 2)
        layer.weight.grad = torch.full((2, 2), float(rank))
        context.average_gradients(layer)
        assert bool((layer.weight.grad == 0.5).all())
    assert not dist.is_initialized()
    torch.save(found, folder / f"{rank}.pt")


def one_rank(case: Case, context: DistributedContext) -> list[Tensor]:
    inputs, centres, labels, exclude = problem(case)
    start = sum(case.sizes[: context.rank])
    mine = slice(start, start + case.sizes[context.rank])
    network = DistributedDataParallel(student())
    embeddings = network(inputs[mine])
    embeddings.retain_grad()
    head = ShardedHead.split(centres, context, chunk=40)
    assert head.classes == CLASSES and len(head.centres) in {150, 151}
    loss = loss_of(context.gather(embeddings), head, context.gather(labels[mine]), exclude)
    loss.backward()
    assert embeddings.grad is not None and network.module.weight.grad is not None
    return [loss.detach(), embeddings.grad / context.world, network.module.weight.grad]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks find pictures and leave results."""
    made = tmp_path_factory.mktemp("ranks")
    write_patterns(made / "faces", identities=4, images=5)
    return made


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, list[Tensor]]]:
    """Results of both ranks, in two processes of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(two_ranks: list[dict[str, list[Tensor]]], case: Case) -> None:
    inputs, centres, labels, exclude = problem(case)
    network = student()
    embeddings = network(inputs)
    embeddings.retain_grad()
    loss = loss_of(embeddings, FrozenHead(centres, chunk=40), labels, exclude)
    loss.backward()
    tolerance = 1e-2 if case.bf16 else 1e-5  # bfloat16 weights round anew in every chunk
    parts = [rank[case.name] for rank in two_ranks]
    for part in parts:
        assert float(part[0]) == pytest.approx(float(loss.detach()), rel=tolerance)
        torch.testing.assert_close(part[2], network.weight.grad, rtol=tolerance, atol=tolerance)  # type: ignore[union-attr]
    gradient = torch.cat([part[1] for part in parts])
    torch.testing.assert_close(gradient, embeddings.grad, rtol=tolerance, atol=tolerance)
    assert torch.equal(parts[0][2], parts[1][2])  # the ranks stay together


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_over_two_ranks_equals_one_process(folder: Path, method: str) -> None:
    alone = trained(method, folder, SINGLE_PROCESS)
    first, second = (torch.load(folder / f"{method}.{rank}.pt", weights_only=True) for rank in range(2))
    assert alone.keys() == first.keys() == second.keys() and len(alone) > 20
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name  # the ranks stay together
        close = 1e-5 * max(float(expected.abs().max()), 1)
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=close, msg=f"{name} differs")


@pytest.mark.usefixtures("two_ranks")
def test_ranks_stay_together_where_each_normalises_its_own_batch(folder: Path) -> None:
    first, second = (torch.load(folder / f"{NORMALISED}.{rank}.pt", weights_only=True) for rank in range(2))
    assert any(name.startswith("adapters.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("batch", [3, 2, 65])
def test_batches_that_do_not_split_are_refused(batch: int) -> None:
    with pytest.raises(InputError, match=f"--batch {batch}: 2 ranks"):
        DistributedContext(0, 2).batch_share(batch)


def test_a_head_smaller_than_the_ranks_is_refused() -> None:
    with pytest.raises(BadHead, match="cannot be split over 4"):
        ShardedHead.split(torch.eye(3), DistributedContext(0, 4))


def test_alone_nothing_is_gathered() -> None:
    context, rows = DistributedContext(), torch.randn(3, 2)
    assert context.gather(rows) is rows and context.mean(2.0) == 2 and context.broadcast("x") == "x"
    assert isinstance(ShardedHead.split(rows, context), FrozenHead)
