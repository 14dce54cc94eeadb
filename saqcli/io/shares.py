"""Which images of a pass are this rank's, where several processes work as one.

training     a slice of every batch: rank r of N takes images r B / N to (r + 1) B / N of each batch of B, in the
             order that one process would read them in. The batch, and so the learning rate, do not depend on N.
evaluation   every N-th batch, whole: no image is read twice, and none is counted twice.
"""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import Sampler

from saqcli.io.seeds import seeds_of


class TrainingShare(Sampler[int]):
    """A rank's images of every whole batch of an epoch; the last batch is left out if it is short.

    Args:
        images: in the split.
        batch: images that all ranks take in a step; a multiple of ``count``.
        rank: of this process.
        count: of processes.
        seed: of the run.

    Attributes:
        epoch: that the next pass is of.
    """

    def __init__(self, images: int, batch: int, rank: int, count: int, seed: int) -> None:
        self.images, self.batch, self.rank, self.count, self.seed = images, batch, rank, count, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        order, share = order_of(self.images, self.seed, self.epoch), self.batch // self.count
        for start in range(self.rank * share, self.images // self.batch * self.batch, self.batch):
            yield from order[start : start + share]

    def __len__(self) -> int:
        return self.images // self.batch * (self.batch // self.count)


class EvaluationShare(Sampler[int]):
    """The images of every ``count``-th batch, from number ``rank`` on, of those of ``sampler``."""

    def __init__(self, sampler: Iterable[int], batch: int, rank: int, count: int) -> None:
        self.sampler, self.batch, self.rank, self.count = sampler, batch, rank, count

    def __iter__(self) -> Iterator[int]:
        return (
            image for place, image in enumerate(self.sampler) if place // self.batch % self.count == self.rank
        )


def order_of(images: int, seed: int, epoch: int) -> list[int]:
    """The order in which one process reads an epoch's images: drawn as torch's loader and random sampler draw it."""
    generator = torch.Generator().manual_seed(seeds_of(seed, epoch, 0)[2])
    for_workers, for_order = (
        int(torch.empty((), dtype=torch.int64).random_(generator=generator)) for _ in range(2)
    )
    del for_workers  # the loader's draw comes first
    order: list[int] = torch.randperm(images, generator=torch.Generator().manual_seed(for_order)).tolist()
    return order
