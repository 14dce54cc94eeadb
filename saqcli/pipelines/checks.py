"""Checks of a command's settings before anything is downloaded or loaded.

A command collects the problems found by all its checks and reports them in one message, such as missing images and a
typing error in ``training.method``. An existing run directory is checked after that, weights and images last.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from saqcli.api.sources import check_not_run
from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.data.datasets import check_split_exists
from saqcli.data.splits import check_scored, data_path, scored_split
from saqcli.data.unlabelled import check_unlabelled
from saqcli.errors import ConfigError, Problems, SaqError
from saqcli.export import STYLES
from saqcli.models.arguments import check_arguments
from saqcli.models.load import LoadedModel, ModelSpec, check_model_name, require_weights
from saqcli.pipelines.bits import (
    accuracy_bound,
    budget_of,
    check_accuracy,
    check_bits,
    check_bits_source,
    check_scheme,
    given_policy,
    make_searcher,
    space_of,
)
from saqcli.pipelines.proxy import proxy_data
from saqcli.pipelines.setup import (
    Network,
    Prepared,
    load_float,
    searches_on_labels,
    try_classifier,
    wrap_and_trace,
)
from saqcli.process_group import pick_device, started_by_torchrun
from saqcli.progress import SILENT
from saqcli.runs.tracking import check_trackers
from saqcli.searchers import SEARCHERS
from saqcli.serialization import named_path
from saqcli.tasks.labels import check_files
from saqcli.training.optimizer import check_perturbed, check_training, make_optimizer, search_training
from saqcli.training.preflight import check_trains


def check_model(section: ModelSection, *, files: bool = True) -> None:
    """Check the model; an empty name, which is reported elsewhere, is skipped.

    Args:
        section: the settings.
        files: whether the weight file must exist.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    if section.name:
        problems.attempt(_check_name, section.name)
        problems.attempt(check_arguments, section.name, section.kwargs)
    if files and section.weights:
        problems.attempt(_check_weights, section.weights)
    problems.check()


def check_builds(problems: Problems, section: ModelSection) -> None:
    """If there are problems already, add those of building the network; no weights are downloaded.

    Args:
        problems: found so far; without any, nothing is built, since the command builds the network next.
        section: the settings.
    """
    if problems.errors:
        problems.attempt(_build, section)


def _build(section: ModelSection) -> None:
    try:
        _check_name(section.name)
    except SaqError:
        return  # reported by check_model
    without = {"pretrained": False, "weights": None, "weights_key": None}
    loaded = load_float(section.model_copy(update=without), SILENT)
    try_classifier(loaded)


def _check_name(name: str) -> None:
    check_not_run(name)
    check_model_name(name)


def _check_weights(weights: str) -> None:
    path = named_path(weights)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"weights {path} cannot be read: it {what}; give a .safetensors, .pth, .pt or .th file"
        )


def check_images(section: DataSection, *splits: Literal["train", "val"], files: bool = True) -> None:
    """Check that images are given and exist.

    Args:
        section: the settings.
        splits: required splits.
        files: whether the files about classes must exist; a resumed run has stored their content.

    Raises:
        SaqError: all problems in one message: no images given, no such folder, a missing split, both splits alike, or
            missing files about classes.
    """
    problems = Problems()
    if files:
        problems.attempt(check_files, section.class_order, section.class_map)
    if {"train", "val"} <= set(splits):
        problems.attempt(check_scored, section)
    path = problems.attempt(data_path, section)
    if path is not None:
        for split in splits:
            problems.attempt(check_split_exists, path, scored_split(section, split))
    problems.check()


def check_device(device: str) -> None:
    """Check that the device is available; under torchrun, the process group checks it.

    Raises:
        ConfigError: no such device.
    """
    if not started_by_torchrun():
        pick_device(device)


def check_styles(styles: Sequence[str]) -> None:
    """Check the export styles.

    Raises:
        ConfigError: unknown, broken or duplicate style.
    """
    for style in styles:
        STYLES.find(style)
        if styles.count(style) > 1:
            raise ConfigError(f"`style={style}` is given twice: one file is written per style")


def check_quantize(config: RunConfig, *, images: bool = False, files: bool = True) -> None:
    """Check the settings of ``saq quantize`` before anything is loaded.

    Args:
        config: of the run.
        images: whether images are required; given ones must exist in any case.
        files: whether weights and policy must exist; False for a resumed run.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    problems.attempt(check_model, config.model, files=files)
    if config.data.calibration is not None:
        problems.attempt(_check_calibration, config, files=files)
    elif config.data.path is not None:
        problems.attempt(check_images, config.data, "train", "val", files=files)
    elif images:
        _add_all_missing(problems, config.model)
    if config.search.proxy is not None:
        problems.attempt(check_images, proxy_data(config), "train", files=files)
    problems.attempt(check_bits_source, config.quantization)
    problems.attempt(check_bits, config.quantization, files=files)
    problems.attempt(check_accuracy, config)
    problems.attempt(make_searcher, config)
    problems.attempt(check_scheme, config)
    problems.attempt(check_training, config)
    problems.attempt(check_device, config.run.device)
    problems.attempt(check_trackers, config.run.track)
    if config.model.new_head and not config.training.epochs:
        problems.add(
            ConfigError(
                "`model.new_head` gives a random classifier, which needs training: remove `training.epochs=0`"
            )
        )
    problems.attempt(check_styles, config.export.styles)
    check_builds(problems, config.model)
    problems.check()


def _add_all_missing(problems: Problems, section: ModelSection) -> None:
    """Add that there are no images, with the shortest ways on; and what else is missing, the weights of the network."""
    named = section.name and not problems.errors
    problems.add(
        ConfigError(
            "no images given: use `data.path=DIR` with train/ and val/, one folder per class in each, or without "
            "labels and training `data.calibration=PHOTOS` `recipe=minutes` with any folder of images"
        )
    )
    if named and section.pretrained and not section.weights:
        problems.attempt(require_weights, ModelSpec(section.name))


def _check_calibration(config: RunConfig, *, files: bool) -> None:
    """Check the images of a run with ``data.calibration``.

    Raises:
        SaqError: all problems in one message: no such images, or labelled ones are missing that the run needs.
    """
    problems, section = Problems(), config.data
    problems.attempt(check_unlabelled, named_path(str(section.calibration)))
    searches = problems.attempt(searches_on_labels, config)
    if section.path is not None:
        splits: list[Literal["train", "val"]] = (
            ["train", "val"] if searches or config.training.epochs else ["val"]
        )
        problems.attempt(check_images, section, *splits, files=files)
    elif searches:
        problems.add(_needs_labels(config))
    if section.path is None and config.training.epochs:
        problems.add(
            ConfigError(
                f"`training.epochs={config.training.epochs}` needs labels, and `data.calibration` has none: use "
                "`training.epochs=0`, or `data.path=DIR` with train/ and val/"
            )
        )
    problems.check()


def _needs_labels(config: RunConfig) -> ConfigError:
    """The error about a search on unlabelled images."""
    if accuracy_bound(config.quantization) is not None:
        return ConfigError(
            "a budget of accuracy is measured on labelled training images, and `data.calibration` has none; agreement "
            "with the float network is not accuracy: use `data.path=DIR` with train/ and val/"
        )
    if config.search.pareto and not SEARCHERS.find(config.quantization.searcher).uses_labels:
        what = f"`search.pareto={config.search.pareto}` scores"
    else:
        what = f"`quantization.searcher={config.quantization.searcher}` searches"
    *most, last = (name for name, entry in SEARCHERS.items() if not entry.uses_labels)
    free = f"{', '.join(most)} or {last}"
    return ConfigError(
        f"{what} on labelled images, and `data.calibration` has none: use `data.path=DIR` with train/, or "
        f"`quantization.searcher=NAME` with {free}, without a front"
    )


def check_search(config: RunConfig, *, images: bool = True, files: bool = True) -> None:
    """Check the settings of ``saq search`` before anything is loaded.

    Args:
        config: of the search.
        images: whether images are required; given ones must exist in any case.
        files: whether weights must exist; False for a resumed search, which may be finished.

    Raises:
        SaqError: all problems in one message.
    """
    section, problems = config.quantization, Problems()
    problems.attempt(check_model, config.model, files=files and config.search.proxy is None)
    data = config.data if config.search.proxy is None else proxy_data(config)
    if data.calibration is not None:
        problems.attempt(check_unlabelled, named_path(data.calibration))
        if data.path is None and problems.attempt(searches_on_labels, config):
            problems.add(_needs_labels(config))
    if data.path is not None or (images and data.calibration is None):
        problems.attempt(check_images, data, "train", files=files)
        if section.min_top1 is not None and config.search.proxy is None:
            problems.attempt(check_images, data, "val", files=files)
    if section.bits is not None or section.policy is not None:
        problems.add(
            ConfigError("`quantization.bits` and `quantization.policy` leave nothing to search: remove them")
        )
    elif section.bops is None and section.size is None and accuracy_bound(section) is None:
        problems.add(
            ConfigError(
                "no budget was given: use `quantization.bops=34G`, `quantization.size=5MB`, "
                "`quantization.max_drop=1`, or several"
            )
        )
    problems.attempt(check_bits, section, files=False)
    problems.attempt(check_accuracy, config)
    problems.attempt(make_searcher, config)
    problems.attempt(check_scheme, config)
    problems.attempt(make_optimizer, nn.Linear(1, 1, device="meta"), search_training(config))
    problems.attempt(check_device, config.run.device)
    problems.attempt(check_trackers, config.run.track)
    check_builds(problems, config.model)
    problems.check()


def network_for(config: RunConfig, loaded: LoadedModel) -> Network:
    """Wrap and trace the network, and check bits, budget, perturbed tensors and distillation for it.

    Raises:
        SaqError: a policy of another network, a budget below the smallest reachable cost, nothing of what
            ``training.perturb`` names, or no trained float model to distill from.
    """
    if config.training.distill and not loaded.trained:
        raise ConfigError(
            f"`training.distill` needs a trained float model, but weights of {loaded.name}, or of its classifier, "
            "are random: use `model.weights=FILE` with all weights, or remove `training.distill`"
        )
    section = config.quantization
    network = wrap_and_trace(loaded, section)
    if config.training.epochs:
        check_perturbed(network.model, config.training)
    if given_policy(config.quantization, network) is None:
        space_of(config.quantization, network).check_reachable(budget_of(config.quantization, network))
    return network


def check_trainable(config: RunConfig, prepared: Prepared) -> None:
    """Check that fine-tuning can train the network.

    Raises:
        UnsupportedModel: it fails in training mode, or does not return class scores.
    """
    network, images = prepared
    if config.training.epochs:
        count = images.train.images
        check_trains(network.model, network.name, network.loaded.preprocessing, config, images=count)
