"""Batches from a cache, with the random numbers of torch's loader.

A pass takes the order of its images, and reads only those that the cache does not hold yet, by the loader's worker
processes. Order and augmentation follow from the numbers that torch's loader and its workers would draw, so that a run
gives the same bits with a cache and without: whether the images fit into the memory that happens to be free changes
nothing but the speed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from saqcli.data.cache import NOT_READ, UNREADABLE, Decoded, Decoder, View
from saqcli.data.transforms import crop_and_flip
from saqcli.data.workers import any_number_of_workers, prepare_workers
from saqcli.errors import DataError
from saqcli.units import counted

_READ_AT_ONCE = 64  # images of a batch that is read for a file


class CachedBatches:
    """The batches of a loader: pixels (N, C, H, W), uint8, on the device, and labels (N,).

    Args:
        loader: torch's loader, which gives order, sizes and number of workers, and is not iterated.
        view: its images in the cache.
        device: of the pixels; they are augmented there.
        augmented: pad, crop at random and flip.

    Attributes:
        loader: as given; ``Loader`` looks at it.
    """

    def __init__(self, loader: Any, view: View, device: torch.device, *, augmented: bool) -> None:
        self.loader, self._view, self._device, self._augmented = loader, view, device, augmented
        self._seeded = False
        size = (32, 32)  # as in ``ImageSet``
        self._blank = view.decoder.transform(Image.new(view.decoder.images.mode, size))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass.

        Raises:
            DataError: as in ``ImageSet``.
        """
        self._view.prepare(self._read_all)
        generators = self._generators()
        batches = [torch.tensor(batch) for batch in self.loader.batch_sampler]
        missing = [batch[self._slots(batch) == NOT_READ] for batch in batches]
        read = self._read(self._view.decoder, [batch.tolist() for batch in missing if len(batch)])
        for number, batch in enumerate(batches):
            if len(missing[number]):
                self._keep(missing[number], next(read))
            if self._view.replace:
                batch = self._readable(batch)
            pixels = self._view.pixels.gather(self._slots(batch), self._blank)
            pixels = pixels.to(self._device, non_blocking=True)
            if self._augmented:
                pixels = crop_and_flip(pixels, generators[number % len(generators)])
            yield pixels, self._view.pixels.labels[self._view.places[batch]]

    def _generators(self) -> Sequence[torch.Generator | None]:
        """The generators of the augmentation in this pass: the global one, or one of each worker, which take turns.

        Torch's loader draws the seed of its workers in every pass, or once if they persist.
        """
        loader = self.loader
        if self._seeded and loader.persistent_workers:
            return (None,)  # only evaluation has persistent workers, and it draws nothing
        self._seeded = True
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator))
        if not loader.num_workers:
            return (None,)
        return [torch.Generator().manual_seed(seed + worker) for worker in range(loader.num_workers)]

    def _slots(self, batch: Tensor) -> Tensor:
        return self._view.pixels.slots(self._view.key, self._view.places[batch])

    def _keep(self, batch: Tensor, decoded: Decoded) -> None:
        self._view.pixels.put(self._view.key, self._view.places[batch], decoded)

    def _readable(self, batch: Tensor) -> Tensor:
        """``batch`` with the next readable image in the place of each unreadable one."""
        batch, images = batch.clone(), len(self._view.places)
        for _ in range(images):
            bad = self._slots(batch) == UNREADABLE
            if not bad.any():
                return batch
            batch[bad] = (batch[bad] + 1) % images
            unknown = torch.tensor(sorted(set(batch[self._slots(batch) == NOT_READ].tolist())))
            for decoded in self._read(self._view.decoder, [unknown.tolist()] if len(unknown) else []):
                self._keep(unknown, decoded)
        name = self._view.decoder.images.name
        raise DataError(f"none of the {counted(images, 'image')} of {name} can be read: check the files")

    def _read_all(self, decoder: Decoder) -> Iterable[Decoded]:
        places = list(range(len(decoder)))
        starts = places[::_READ_AT_ONCE]
        return self._read(decoder, [places[start : start + _READ_AT_ONCE] for start in starts])

    def _read(self, decoder: Decoder, batches: Sequence[list[int]]) -> Iterator[Decoded]:
        """Read images without a change of the global random state."""
        if not batches:
            return
        with any_number_of_workers():
            loader: DataLoader[Any] = DataLoader(
                decoder,
                batch_sampler=batches,
                num_workers=min(self.loader.num_workers, len(batches)),
                generator=torch.Generator(),
            )
        prepare_workers(loader)
        yield from loader
