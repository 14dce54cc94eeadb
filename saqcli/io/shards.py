"""Which images of a sharded split a process reads, and in which order.

timm's own reader repeats images to fill the last batch of every worker, and shuffles by what it has drawn before.
Here a pass gives each image once, whatever the number of workers, and its order follows from (seed, epoch,
workers), so that a run that was stopped goes on with the same images.

Every worker reads a run of whole batches, so that it opens only the archives that these lie in.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from torch.utils.data import get_worker_info

from saqcli.io.archives import Member, Part, read_part

MIXED = 2048  # images that a worker holds, still encoded, to draw the next one from
TOGETHER = 8  # images that are drawn from a file before it is the turn of the next


@dataclass
class Shards:
    """A split in tar files, or a part of it, and how a pass goes over it.

    Attributes:
        root: folder or address that the files are in.
        parts: what is read of each file.
        batch_size: workers share the images by batches.
        shuffled: by (seed, epoch); otherwise in order, which is another one for another number of workers.
        drop_last: leave out the last batch if it is short.
        seed: of the order.
        epoch: the pass that comes next.
        share: (this process, all processes) that go over the images together. With ``drop_last`` all get equally many,
            and less than one image for each is left out; otherwise each gets whole batches, and none comes twice.
    """

    root: str
    parts: tuple[Part, ...]
    batch_size: int = 1
    shuffled: bool = False
    drop_last: bool = False
    seed: int = 0
    epoch: int = 0
    share: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        """Images that one pass gives."""
        return self._own()[1]

    def _own(self) -> tuple[int, int]:
        """First image of this process, and how many it has."""
        total, (rank, count) = sum(map(len, self.parts)), self.share
        if self.drop_last:
            each = total // count
            return rank * each, each - each % self.batch_size
        batches = -(-total // self.batch_size)
        first, last = (min(total, batches * r // count * self.batch_size) for r in (rank, rank + 1))
        return first, last - first

    def set_epoch(self, count: int, /) -> None:
        """Choose the order of the next pass."""
        self.epoch = count

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Nothing: a worker asks torch which one it is."""

    def draw(self, count: int, seed: int) -> "Shards":
        """``count`` images: the first ones of files drawn by ``seed``, a few of each in turn.

        Files may hold a class each, and reading the beginning of one does not take its whole.
        """
        parts = _shuffled(self.parts, np.random.SeedSequence(seed))
        return self._split(parts, _in_turns([len(part) for part in parts], count))[0]

    def divide(self, count: int, seed: int) -> tuple["Shards", "Shards"]:
        """``count`` images, of every file its share, and all others; files come in an order drawn by ``seed``."""
        parts = _shuffled(self.parts, np.random.SeedSequence(seed))
        ends = np.cumsum([len(part) for part in parts])
        shares = np.diff(np.rint(ends * (count / ends[-1])).astype(int), prepend=0)
        return self._split(parts, shares.tolist())

    def _split(self, parts: Sequence[Part], taken: Sequence[int]) -> tuple["Shards", "Shards"]:
        """The first of each part, as many as are ``taken``, and what is left."""
        pairs = list(zip(parts, taken, strict=True))
        first = [replace(part, stop=part.start + n) for part, n in pairs if n]
        rest = [replace(part, start=part.start + n) for part, n in pairs if n < len(part)]
        return replace(self, parts=tuple(first)), replace(self, parts=tuple(rest))

    def __iter__(self) -> Iterator[tuple[Member, int]]:
        """Each image of this worker once.

        Raises:
            DataError: a file that is missing, damaged, or not what ``_info.json`` says.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        parts = self.parts
        if self.shuffled:
            parts = _shuffled(parts, np.random.SeedSequence((self.seed, self.epoch)))
        begin, count = self._own()
        each, more = divmod(-(-count // self.batch_size), workers)
        first = worker * each + min(worker, more)
        last = first + each + (worker < more)
        mine = _cut(parts, begin + first * self.batch_size, begin + min(last * self.batch_size, count))
        images = chain.from_iterable(read_part(self.root, part) for part in mine)
        if not self.shuffled:
            return images
        seeds = np.random.SeedSequence((self.seed, self.epoch, self.share[0], worker))
        return _mixed(images, random.Random(int(seeds.generate_state(1, np.uint64)[0])))


def _cut(parts: Sequence[Part], first: int, last: int) -> tuple[Part, ...]:
    """Images ``first`` to ``last`` of all that ``parts`` hold, one part after the other."""
    kept = []
    for part in parts:
        start, stop = max(first, 0), min(last, len(part))
        if start < stop:
            kept.append(replace(part, start=part.start + start, stop=part.start + stop))
        first, last = first - len(part), last - len(part)
    return tuple(kept)


def _in_turns(available: Sequence[int], count: int) -> list[int]:
    """How many of ``count`` each gives, ``TOGETHER`` at a time for as long as it has some."""
    taken = [0] * len(available)
    left = min(count, sum(available))
    while left:
        for place, most in enumerate(available):
            given = min(TOGETHER, most - taken[place], left)
            taken[place] += given
            left -= given
    return taken


def _shuffled(parts: Sequence[Part], seeds: np.random.SeedSequence) -> tuple[Part, ...]:
    return tuple(parts[place] for place in np.random.default_rng(seeds).permutation(len(parts)))


def _mixed(images: Iterator[tuple[Member, int]], rng: random.Random) -> Iterator[tuple[Member, int]]:
    """All images, each drawn from ``MIXED`` that lie ready."""
    held: list[tuple[Member, int]] = []
    for image in images:
        if len(held) < MIXED:
            held.append(image)
            continue
        place = rng.randrange(MIXED)
        held[place], image = image, held[place]
        yield image
    rng.shuffle(held)
    yield from held
