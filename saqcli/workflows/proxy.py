"""Searching on a small data set in the place of the network's own: the same layers, other images and classes.

The budget and the policy are those of the target network. The proxy's network has its name and its layers, and is
built for the proxy's classes and image size. Without weights of its own it takes those of the target, with a new
classifier that is trained in floating point before the search.
"""

import torch

from saqcli.algorithms.searchers.problem import NO_MEMORY, Memory
from saqcli.algorithms.training import Score
from saqcli.config import DataSection, ModelSection, ProxySection, RunConfig
from saqcli.errors import PolicyMismatch
from saqcli.io.folders import find_images, find_split
from saqcli.io.labels import ORDERS
from saqcli.io.models import LoadedModel
from saqcli.io.seeds import seed_everything
from saqcli.progress import Progress
from saqcli.strict import named_path
from saqcli.workflows.bits import float_policy
from saqcli.workflows.optimization import search_training
from saqcli.workflows.setup import Images, Network, classes_of, load_float, wrap_and_trace
from saqcli.workflows.short_training import in_float, train
from saqcli.workflows.trainable import check_trains


def proxy_data(config: RunConfig) -> DataSection:
    """The data section with the proxy's path, where it has one, and without the files about the target's classes."""
    proxy = config.search.proxy or ProxySection()
    order = config.data.class_order if config.data.class_order in ORDERS else None
    changes = {"path": proxy.data or config.data.path, "class_order": order, "class_map": None}
    return config.data.model_copy(update=changes)


def open_proxy(
    config: RunConfig, network: Network, device: torch.device, progress: Progress
) -> tuple[Network, Images]:
    """The network of the same name, built for the proxy's images, and these; not fitted to them yet.

    Raises:
        DataError: no images are there.
        PolicyMismatch: its layers are others than those of ``network``.
    """
    proxy, data = config.search.proxy or ProxySection(), proxy_data(config)
    seed_everything(config.run.seed)  # of a new classifier
    loaded = load_float(_section(config.model, proxy, data), progress, new_head=True)
    images = Images.training_alone(
        data, classes_of(loaded), loaded.preprocessing, device, config.run.seed, progress
    )
    if _epochs(proxy, loaded):
        check_trains(
            loaded.model, loaded.name, loaded.preprocessing, config, images=images.train.images, limits={}
        )
    small = wrap_and_trace(loaded, quantize_attention=config.quantization.quantize_attention)
    small.model.to(device)
    names, wanted = ([layer.name for layer in each.costs.layers] for each in (small, network))
    float_policy(network).check_fits(f"{small.name} as it is built for the proxy", names)
    if names != wanted:
        raise PolicyMismatch(
            "the layers of the proxy's network run in another order: give another input_size"
        )
    return small, images


def fit_proxy(
    proxy: Network, images: Images, config: RunConfig, progress: Progress, memory: Memory = NO_MEMORY
) -> None:
    """Train the network in floating point on the proxy's images, as the settings of the search say, where its weights
    are not of these.

    Raises:
        Interrupted: asked to stop; the memory holds what was done.
    """
    epochs = _epochs(config.search.proxy or ProxySection(), proxy.loaded)
    if not epochs:
        return

    def note(score: Score) -> None:
        progress.note(f"proxy: top-1 {score.top1:.2f} % in training, in floating point")

    training = in_float(search_training(config), config.data.batch_size, epochs=epochs, schedule="cosine")
    train(
        proxy.model,
        images,
        training,
        proxy.loaded.num_classes,
        title="fitting the proxy, epoch",
        progress=progress,
        after_epoch=note,
        memory=memory,
    )
    proxy.model.eval()


def _epochs(proxy: ProxySection, loaded: LoadedModel) -> int:
    """Of its training in floating point."""
    if proxy.epochs is not None:
        return proxy.epochs
    return 0 if loaded.trained else 1


def _section(model: ModelSection, proxy: ProxySection, data: DataSection) -> ModelSection:
    """The target's model section with what the proxy has otherwise."""
    classes, folder = proxy.num_classes, named_path(data.path or "")
    if classes is None and data.path is not None and folder.is_dir():
        classes = len(find_images(find_split(folder, "train"), dead_images=True).images)
    given = {name: getattr(proxy, name) for name in ("input_size", "weights", "mean", "std")}
    given["num_classes"] = classes
    changes = {name: value for name, value in given.items() if value is not None}
    if proxy.weights or proxy.weights_key:  # the target's key is of the target's file
        changes["weights_key"] = proxy.weights_key
    return model.model_copy(update=changes)
