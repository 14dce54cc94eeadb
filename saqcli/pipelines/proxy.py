"""The images of a search: parts of the training split, or a proxy data set.

A search uses parts of the training split, so that the validation split stays unseen:

drawn       ``search.images`` images of ``search.classes`` classes; all by default
divided     held-out images and training images, each with a share of every class
scoring     the same held-out images for every configuration, kept in memory

A proxy is a small data set that replaces the network's own in the search. Budget and policy are those of the target
network. The proxy's network has the same name and layers, and is built for the classes and the image size of the proxy.
Without separate weights it loads those of the target, with a new classifier that is trained in floating point before
the search.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from saqcli import distributed
from saqcli.api.networks import float_policy
from saqcli.config import DataSection, ModelSection, ProxySection, RunConfig, SearchSection
from saqcli.data.batches import Loader
from saqcli.data.datasets import class_subset, divide, subset
from saqcli.data.folders import find_images, find_split
from saqcli.data.loaders import read_all
from saqcli.data.splits import Images, validation_loader
from saqcli.errors import PolicyMismatch
from saqcli.pipelines.setup import Network, load_float, training_images, wrap_and_trace
from saqcli.progress import Progress
from saqcli.random_state import random_state, seed_everything
from saqcli.searchers import SearchImages
from saqcli.serialization import named_path
from saqcli.tasks.class_names import ORDERS
from saqcli.tasks.classification import Meter
from saqcli.training.loop import NO_MEMORY, Memory
from saqcli.training.optimizer import in_float, search_training
from saqcli.training.preflight import check_trains
from saqcli.training.trainer import Trainer

Batch = tuple[Tensor, Tensor]


def search_images(images: Images, section: SearchSection, progress: Progress) -> SearchImages:
    """The parts of ``images.train`` for a search.

    Raises:
        DataError: a streamed data set, or too few images.
    """
    split = images.train
    if section.classes is not None:
        split = class_subset(split, section.classes, images.seed)
    if section.images is not None:
        split = subset(split, section.images, images.seed)
    held_out, training = divide(split, section.held_out, images.seed)
    plain = images.section.model_copy(update={"augmentation": "none"})
    scoring = validation_loader(
        held_out, images.preprocessing, images.section, images.device, images.seed, section.scoring_images
    )
    return SearchImages(
        training=replace(images, train=training).training(),
        held_out=replace(images, train=held_out, section=plain).training(),
        scoring=CachedBatches(scoring, progress),
        whole=replace(images, train=split).training(),
        labelled=images.trains,
    )


class CachedBatches(Sequence[Batch]):
    """The batches of a loader, read once and cached, without unreadable images."""

    def __init__(self, loader: Loader, progress: Progress) -> None:
        self._loader, self._progress = loader, progress
        self._batches: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self._read())

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self._read()[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._read())

    def _read(self) -> list[Batch]:
        if self._batches is None:
            self._batches = read_all(self._loader, self._progress, "evaluate")
        return self._batches


def proxy_data(config: RunConfig) -> DataSection:
    """The data section with the proxy's path, if any, and without the files about the target's classes."""
    proxy = config.search.proxy or ProxySection()
    order = config.data.class_order if config.data.class_order in ORDERS else None
    changes = {
        "path": proxy.data or config.data.path,
        "class_order": order,
        "class_map": None,
        "calibration": None,
    }
    return config.data.model_copy(update=changes)


def open_proxy(
    config: RunConfig, network: Network, device: torch.device, progress: Progress
) -> tuple[Network, Images]:
    """The network of the same name, built for the proxy's images and not yet trained on them, and these images.

    Raises:
        DataError: there are no images.
        PolicyMismatch: its layers differ from those of ``network``.
    """
    proxy, data = config.search.proxy or ProxySection(), proxy_data(config)
    seed_everything(config.run.seed)  # of a new classifier
    loaded = load_float(_section(config.model, proxy, data), progress, new_head=True)
    images = training_images(data, loaded, device, config.run.seed, progress)
    if _epochs(proxy, trained=loaded.trained):
        check_trains(
            loaded.model, loaded.name, loaded.preprocessing, config, images=images.train.images, limits={}
        )
    small = wrap_and_trace(loaded, config.quantization)
    small.model.to(device)
    names, wanted = ([layer.name for layer in each.costs.layers] for each in (small, network))
    float_policy(network).check_fits(f"{small.name} as it is built for the proxy", names)
    if names != wanted:
        raise PolicyMismatch(
            "the layers of the proxy's network run in another order: use another `search.proxy.input_size`"
        )
    return small, images


def fit_proxy(
    proxy: Network, images: Images, config: RunConfig, progress: Progress, memory: Memory = NO_MEMORY
) -> None:
    """Train the network in floating point on the proxy's images, unless its weights fit them already.

    Raises:
        Interrupted: a signal asked to stop; the memory holds the state.
    """
    epochs = _epochs(config.search.proxy or ProxySection(), trained=proxy.loaded.trained)
    if not epochs:
        return
    trainer = Trainer(
        proxy.model,
        images.training(),
        in_float(search_training(config), config.data.batch_size, epochs=epochs, schedule="cosine"),
        num_classes=proxy.loaded.num_classes,
        image_size=max(images.preprocessing.input_size[1:]),
        run=_ProxyRun(memory, progress),
        title="fitting the proxy, epoch",
        progress=progress,
    )
    if (kept := memory.load()) is not None:
        memory.restore_random()
        trainer.load_state_dict(_unpack(kept))
    trainer.fit()
    proxy.model.eval()


class _ProxyRun:
    """A training run that saves its state in the memory of a search."""

    def __init__(self, memory: Memory, progress: Progress) -> None:
        self._memory, self._progress = memory, progress

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Offer the state to the memory, see ``Memory.offer``."""
        self._memory.offer(lambda: _pack(state()), milestone=milestone, failing=failing)

    def log(self, **values: Any) -> None:
        """Note the accuracy."""
        self._progress.note(f"proxy: training top-1 {values['top1']:.2f} % in floating point")

    def check_signal(self) -> None:
        """Does nothing, since there is no evaluation."""


def _pack(state: dict[str, Any]) -> dict[str, Any]:
    """A trainer's state in the format of ``proxy.ckpt``; the memory adds the random states of all ranks."""
    total = Meter()
    for rank in state["ranks"]:
        total.add(Meter(**rank["meter"]))
    kept = {name: state[name] for name in ("model", "optimizer", "minimizer", "setbacks")}
    return {**kept, "meter": vars(total), "position": list(state["position"].values())}


def _unpack(kept: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``_pack``, after the random states are restored; the first rank gets all figures."""
    epoch, step = kept["position"]
    meters = [kept["meter"], *(vars(Meter()) for _ in range(1, distributed.count()))]
    ranks = [{"random": random_state(), "meter": meter} for meter in meters]
    return {**kept, "position": {"epoch": epoch, "step": step}, "ranks": ranks}


def _epochs(proxy: ProxySection, *, trained: bool) -> int:
    """The number of epochs of its training in floating point."""
    if proxy.epochs is not None:
        return proxy.epochs
    return 0 if trained else 1


def _section(model: ModelSection, proxy: ProxySection, data: DataSection) -> ModelSection:
    """The target's model section with the proxy's changes."""
    classes, folder = proxy.num_classes, named_path(data.path or "")
    if classes is None and data.path is not None and folder.is_dir():
        classes = len(find_images(find_split(folder, "train"), dead_images=True).images)
    given = {name: getattr(proxy, name) for name in ("input_size", "weights", "mean", "std")}
    given["num_classes"] = classes
    changes = {name: value for name, value in given.items() if value is not None}
    if proxy.weights or proxy.weights_key:  # the target's key refers to the target's file
        changes["weights_key"] = proxy.weights_key
    return model.model_copy(update=changes)
