"""Minimizer steps on tiny networks: batches, chunks, and snapshots."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli import distributed
from saqcli.training.minimizers import MINIMIZERS, Chunk, MicroBatch, Minimizer
from saqcli.training.minimizers.base import Loss
from saqcli.training.objective import Piece
from saqcli.training.options import accepted
from saqcli.training.step import Recovery
from tests.support.networks import NETWORKS, images, quantize

RHO = 0.3
Batch = tuple[Tensor, Tensor]


def batch(count: int = 16, seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return images(count, seed), torch.randint(0, 5, (count,), generator=generator)


def loss_of(model: nn.Module, data: Batch) -> Loss:
    return lambda *, ascent=False: F.cross_entropy(model(data[0]), data[1])


def chunks_of(model: nn.Module, data: Batch, size: int) -> list[Chunk]:
    total = len(data[1])
    pieces = zip(data[0].split(size), data[1].split(size), strict=True)
    return [[MicroBatch(loss_of(model, piece), len(piece[1]) / total)] for piece in pieces]


def one_chunk(loss: Loss) -> list[Chunk]:
    return [[MicroBatch(loss, 1.0)]]


def trainable(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return quantize(NETWORKS[name]).model.to(dtype).train()


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-3)


def still(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose step changes nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def taken(method: str, **options: Any) -> dict[str, Any]:
    """Those of the options that the method takes."""
    return {name: value for name, value in options.items() if name in accepted(MINIMIZERS[method])[0]}


def make(
    method: str, model: nn.Module, base: torch.optim.Optimizer, rho: float = RHO, **options: Any
) -> Minimizer:
    """Any minimizer of the table, with a radius where it has one."""
    return MINIMIZERS[method](model, base, **taken(method, rho=rho), **options)


def snapshot(model: nn.Module, base: torch.optim.Optimizer | None = None) -> list[tuple[str, Tensor]]:
    """A copy of every tensor of the model and the optimizer state."""
    tensors = [(name, value.detach().clone()) for name, value in model.state_dict().items()]
    if base is not None:
        for index, state in base.state_dict()["state"].items():
            tensors += [(f"{index}.{key}", v.clone()) for key, v in state.items() if isinstance(v, Tensor)]
    return tensors


def assert_bitwise_equal(one: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in one] == [name for name, _ in other]
    different = [name for (name, a), (_, b) in zip(one, other, strict=True) if not torch.equal(a, b)]
    assert not different


class AttemptWatch:
    """Weak references to the pieces of every attempt, and to its ``results``.

    Attributes:
        alive: at each reduction of the micro-batch, how many of the attempt before are still referenced.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[int] = []
        self._seen: list[weakref.ref[Any]] = []
        init, shrink = Piece.__init__, Recovery.shrink_micro_batch

        def watched_init(piece: Piece, *arguments: Any) -> None:
            self.add(piece)
            init(piece, *arguments)

        def watched_shrink(recovery: Recovery, *arguments: Any) -> None:
            assert self._seen
            self.alive.append(sum(reference() is not None for reference in self._seen))
            self._seen.clear()
            shrink(recovery, *arguments)

        monkeypatch.setattr(Piece, "__init__", watched_init)
        monkeypatch.setattr(Recovery, "shrink_micro_batch", watched_shrink)

    def add(self, *results: Any) -> None:
        """Watch them, and what they contain if they are sequences."""
        for result in results:
            if isinstance(result, tuple | list):
                self.add(*result)
            elif isinstance(result, Tensor | Piece):
                self._seen.append(weakref.ref(result))


def fail_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out on another rank in the first attempt."""
    answers = iter([True])
    monkeypatch.setattr(distributed, "any_of", lambda flag: flag or next(answers, False))
