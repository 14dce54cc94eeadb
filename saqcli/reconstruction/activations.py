"""What a block is fitted on: its inputs in the quantized and in the float network, and the float block's outputs.

As long as they fit in memory, all of them are kept, and a step to the next block runs that one block only. Otherwise
they are computed again whenever rows of them are asked for, from the last inputs that were kept: those of an earlier
block, or the images themselves.

The bits are the same either way. Results may depend on the number of images that are computed together, on strides and
on the alignment in memory, so all passes take the same ``CHUNK`` images together, as contiguous tensors of their own.

Each rank has its own images, the same number on all ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.errors import DataError, UnsupportedModel
from saqcli.machine import free_memory
from saqcli.quant.calls import Call
from saqcli.quant.layer import quantized_layers, weights_given
from saqcli.reconstruction.blocks import Block

CHUNK = 8  # images that are computed together
SHARE = 1 / 2  # of the free memory, the most that is filled
UNKNOWN_MEMORY = 2**32  # bytes taken as free where the system does not say
LEAST = 1e-30  # of the mean of weights, avoids 0 / 0

Value = Tensor | Call


class Rows(Protocol):
    """A tensor (N, ...), or what gives its rows."""

    def __len__(self) -> int:
        """Number of rows, one per image."""

    def __getitem__(self, index: Tensor) -> Any:
        """The rows at ``index``, int64 (n,): a new tensor, or a call for a network of several inputs."""


class Samples:
    """The calibration images of a network whose calls are more than one tensor.

    Args:
        call: of all images.
    """

    def __init__(self, call: Call) -> None:
        self._call, self._count = call, call.count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Tensor) -> Call:
        def chosen(tensor: Tensor) -> Tensor:
            whole = not tensor.dim() or len(tensor) != self._count
            return tensor if whole else tensor[index.to(tensor.device)]

        return self._call.map(chosen)


def samples_of(calls: Iterable[Tensor | Call]) -> Rows:
    """This rank's images of all ``calls``: a tensor, or ``Samples`` where a call is more than one tensor.

    Raises:
        DataError: there are none.
        UnsupportedModel: calls that differ in more than their images.
    """
    given = [Call.of(call) for call in calls]
    if not given or not any(call.count for call in given):
        raise DataError("there are no calibration images: give at least one batch")
    first = given[0]
    per_image = [bool(tensor.dim()) and len(tensor) == first.count for tensor in first.tensors]
    if any(len(call.tensors) != len(per_image) for call in given):
        raise UnsupportedModel("the calls of the calibration data have different numbers of tensors")
    try:
        joined = iter(
            torch.cat([call.tensors[place] for call in given]) if each else first.tensors[place]
            for place, each in enumerate(per_image)
        )
        call = first.map(lambda tensor: next(joined))
    except RuntimeError as error:
        raise UnsupportedModel(
            "the calibration images have different sizes: give images of one size"
        ) from error
    rows: Rows = (
        call.args[0] if len(call.args) == 1 and not call.kwargs and len(call.tensors) == 1 else Samples(call)
    )
    ranks = distributed.count()
    if ranks == 1 or len(rows) < ranks:
        return rows
    most = len(rows) // ranks
    index = torch.arange(distributed.index(), most * ranks, ranks)
    mine = rows[index]
    return Samples(mine) if isinstance(mine, Call) else mine


def memory_limit(device: torch.device) -> int:
    """Bytes that activations may take on ``device``, the same on all ranks."""
    if device.type == "cuda":
        free: int | None = torch.cuda.mem_get_info(device)[0]
        processes = 1
    else:
        free, processes = free_memory(), distributed.count()
    share = SHARE * (UNKNOWN_MEMORY if free is None else free) / processes
    return int(min(distributed.gathered(share)))


@dataclass(frozen=True)
class BlockData:
    """What one block is fitted on; each has a row for every image.

    Attributes:
        inputs: of the block, behind the quantized blocks before it.
        float_inputs: the float network's; the same object for the first block.
        targets: the float block's outputs on ``float_inputs``.
        weights: of the squared errors, in the shape of ``targets``; None for equal ones.
        kept: whether all of them are in memory.
    """

    inputs: Rows
    float_inputs: Rows
    targets: Rows
    weights: Rows | None
    kept: bool


class Activations:
    """The activations between the blocks of a network, from the first block to the last.

    Args:
        model: quantized.
        float_model: its float network.
        blocks: of both, in order of execution.
        images: inputs of the first block.
        limit: bytes that may be kept besides the images; None for half of the free memory.
        seed: of the labels that Fisher weights need.
        fisher: whether to give weights: squared gradients of log p(y), with y drawn from the float network's own
            prediction p (BRECQ, arXiv:2102.05426).
    """

    def __init__(
        self,
        model: nn.Module,
        float_model: nn.Module,
        blocks: Sequence[Block],
        images: Rows,
        *,
        limit: int | None = None,
        seed: int = 0,
        fisher: bool = False,
    ) -> None:
        self._model, self._float_model, self._blocks = model, float_model, blocks
        self._base = 0  # the block whose inputs are kept
        self._inputs = self._float_inputs = images
        self._targets: Rows | None = None  # of that block, if they are kept too
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._limit = memory_limit(device) if limit is None else limit
        self._fisher = fisher
        self._scales: dict[int, Tensor] = {}
        self._drawn = torch.rand(len(images), generator=torch.Generator().manual_seed(seed))
        self._layers = quantized_layers(model)

    @property
    def count(self) -> int:
        """Images of this rank."""
        return len(self._inputs)

    def at(self, index: int) -> BlockData:
        """The activations around block ``index``, in rising order; all blocks before it are fitted."""
        first = self._around(index, torch.arange(min(CHUNK, self.count)))
        held = [each for each in first if isinstance(each, Tensor)]
        size = sum(each.element_size() * each.numel() for each in held) // min(CHUNK, self.count) * self.count
        if size > self._limit:
            self._targets = None
            again = _Again(self, index, self._limit - self._kept_bytes())
            inputs = _Column(again, 0)
            return BlockData(
                inputs,
                inputs if index == 0 else _Column(again, 1),
                _Column(again, 2),
                _Column(again, 3) if self._fisher else None,
                kept=False,
            )
        if self._base < index:
            moved = self._all(lambda rows: self._before(index, rows))
            self._inputs, self._float_inputs = moved[0], moved[1]
            self._base, self._targets = index, None
        rest = self._all(lambda rows: self._around(index, rows)[2:])
        self._targets = rest[0]
        weights = rest[1] if self._fisher else None
        return BlockData(self._inputs, self._float_inputs, rest[0], weights, kept=True)

    def _kept_bytes(self) -> int:
        kept = [each for each in (self._inputs, self._float_inputs) if isinstance(each, Tensor)]
        return sum(each.element_size() * each.numel() for each in kept) if self._base else 0

    def _all(self, compute: Callable[[Tensor], Sequence[Tensor | None]]) -> list[Any]:
        """The results of ``compute`` for all images, joined; it is called for one chunk after the other."""
        whole: list[Any] = []
        for start in range(0, self.count, CHUNK):
            rows = torch.arange(start, min(start + CHUNK, self.count))
            for place, part in enumerate(compute(rows)):
                if start == 0:
                    whole.append(None if part is None else part.new_empty((self.count, *part.shape[1:])))
                if part is not None:
                    whole[place][start : start + len(rows)] = part
        return whole

    @torch.no_grad()
    def _before(self, index: int, rows: Tensor) -> tuple[Any, Any]:
        """Inputs of block ``index``: of the quantized and of the float network."""
        x, in_float = self._inputs[rows], self._float_inputs[rows]
        passed = range(self._base, index)
        with self._given(passed):
            for place in passed:
                x = self._blocks[place](self._model, x).contiguous()
        for place in passed:
            if place == self._base and self._targets is not None:
                in_float = self._targets[rows]
            else:
                in_float = self._blocks[place](self._float_model, in_float).contiguous()
        return x, in_float

    def _around(self, index: int, rows: Tensor) -> tuple[Any, Any, Tensor, Tensor | None]:
        """Inputs of block ``index``, float inputs, targets and weights of the images at ``rows``, a whole chunk."""
        x, in_float = self._before(index, rows)
        with torch.no_grad():
            target = self._blocks[index](self._float_model, in_float).contiguous()
        return x, in_float, target, self._weights(index, target, rows) if self._fisher else None

    def _weights(self, index: int, target: Tensor, rows: Tensor) -> Tensor:
        """Squared gradients of log p(y) with respect to the block's output, of mean 1 over the first images."""
        with torch.enable_grad():
            output = scores = target.detach().clone().requires_grad_(True)
            for block in self._blocks[index + 1 :]:
                scores = block(self._float_model, scores)
            if scores.dim() != 2:
                raise UnsupportedModel(
                    "Fisher weights need class scores (N, classes), which this network does not return: use "
                    "`weighting=none`"
                )
            logs = scores.log_softmax(1)
            below = logs.detach().exp().cumsum(1) < self._drawn[rows].to(logs.device)[:, None]
            label = below.sum(1).clamp(max=scores.shape[1] - 1)
            likelihood = logs.gather(1, label[:, None]).sum()
            (gradient,) = torch.autograd.grad(likelihood, output)
        squared = gradient.detach().square()
        if index not in self._scales:  # the first chunk is always computed first
            self._scales[index] = squared.mean().clamp_min(LEAST)
        return squared / self._scales[index]

    @contextmanager
    def _given(self, passed: Iterable[int]) -> Iterator[None]:
        """Within the context the weights of some blocks are quantized once."""
        names = [name for place in passed for name in self._blocks[place].layers if name in self._layers]
        owners = [self._layers[name] for name in names if not self._layers[name].tied_to]
        with weights_given([layer for layer in owners if layer.given_weight is None]):
            yield


class _Again:
    """Activations around one block that are computed when they are asked for; as many chunks as fit are kept."""

    def __init__(self, source: Activations, index: int, room: int) -> None:
        self.source, self._index, self._room = source, index, room
        self._kept: dict[int, tuple[Any, ...]] = {}
        self._last: tuple[list[int], list[Any]] | None = None

    def rows(self, index: Tensor) -> list[Any]:
        """The rows at ``index`` of inputs, float inputs, targets and weights."""
        wanted = index.tolist()
        if self._last is not None and self._last[0] == wanted:
            return self._last[1]
        self._last = None
        places = sorted({each // CHUNK for each in wanted})
        chunks = [self._chunk(place) for place in places]
        offsets = {place: number * CHUNK for number, place in enumerate(places)}
        chosen = torch.tensor([offsets[each // CHUNK] + each % CHUNK for each in wanted])
        columns = [_chosen([chunk[column] for chunk in chunks], chosen) for column in range(4)]
        self._last = wanted, columns
        return columns

    def _chunk(self, place: int) -> tuple[Any, ...]:
        if place in self._kept:
            return self._kept[place]
        rows = torch.arange(place * CHUNK, min((place + 1) * CHUNK, self.source.count))
        found = self.source._around(self._index, rows)
        size = sum(each.element_size() * each.numel() for each in found if isinstance(each, Tensor))
        if size <= self._room:
            self._room -= size
            self._kept[place] = found
        return found


def _chosen(parts: Sequence[Any], rows: Tensor) -> Any:
    """``rows`` of tensors, or of calls, that follow each other."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Call):
        whole = _joined(parts)
        return whole[rows]
    return torch.cat(list(parts))[rows.to(parts[0].device)]


def _joined(parts: Sequence[Call]) -> Samples:
    """Calls of some images each as the call of all."""
    count = parts[0].count
    joined = iter(
        torch.cat([part.tensors[place] for part in parts])
        if tensor.dim() and len(tensor) == count
        else tensor
        for place, tensor in enumerate(parts[0].tensors)
    )
    return Samples(parts[0].map(lambda tensor: next(joined)))


class _Column:
    """The inputs, float inputs, targets or weights of a block, computed when they are asked for."""

    def __init__(self, again: _Again, column: int) -> None:
        self._again, self._column = again, column

    def __len__(self) -> int:
        return self._again.source.count

    def __getitem__(self, index: Tensor) -> Any:
        return self._again.rows(index)[self._column]
