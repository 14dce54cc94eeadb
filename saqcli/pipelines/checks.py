"""What can be seen to be wrong with a command before anything is fetched or loaded.

Every command collects what its checks find and tells all of it at once: missing images beside a typing mistake
in ``training.method``. Whether a run directory is there already is looked at after that; weights and images come last.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.data.datasets import check_split_exists
from saqcli.data.splits import data_path
from saqcli.errors import ConfigError, Problems, SaqError
from saqcli.export import STYLES
from saqcli.models.arguments import check_arguments
from saqcli.models.load import LoadedModel, check_model_name
from saqcli.pipelines.bits import budget_of, check_bits, check_way, given_policy, make_searcher, space_of
from saqcli.pipelines.calibration import scheme_of
from saqcli.pipelines.proxy import proxy_data
from saqcli.pipelines.setup import Network, Prepared, answering, load_float, wrap_and_trace
from saqcli.pipelines.targets import check_not_run
from saqcli.process_group import pick_device, started_by_torchrun
from saqcli.progress import SILENT
from saqcli.quant.tracer import try_model
from saqcli.serialization import named_path
from saqcli.tasks.labels import check_files
from saqcli.training.optimizer import check_training, make_optimizer, search_training
from saqcli.training.preflight import check_trains


def check_model(section: ModelSection, *, files: bool = True) -> None:
    """Refuse a model that cannot be meant; an empty name, which was complained of before, is not looked up.

    Args:
        section: of the settings.
        files: whether its weight file must be there.

    Raises:
        SaqError: all that is wrong.
    """
    problems = Problems()
    if section.name:
        problems.attempt(_check_name, section.name)
        problems.attempt(check_arguments, section.name, section.kwargs)
    if files and section.weights:
        problems.attempt(_check_weights, section.weights)
    problems.check()


def check_builds(problems: Problems, section: ModelSection) -> None:
    """Where there are problems already, add those that only building the network shows; no weights are fetched for it.

    Args:
        problems: found so far; without any nothing happens, as the network is built soon anyway.
        section: of the settings.
    """
    if problems.errors:
        problems.attempt(_build, section)


def _build(section: ModelSection) -> None:
    try:
        _check_name(section.name)
    except SaqError:
        return  # that was complained of
    without = {"pretrained": False, "weights": None, "weights_key": None}
    loaded = load_float(section.model_copy(update=without), SILENT)
    with answering(loaded.name):
        try_model(loaded.model, torch.zeros(1, *loaded.preprocessing.input_size))


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
    """Refuse images that are missing or not there.

    Args:
        section: of the settings.
        splits: that it must have.
        files: whether files about its classes must be there; a run that is resumed has what they said.

    Raises:
        SaqError: all that is wrong: none was named, no such folder, it lacks one of ``splits``, or files about its
            classes that are not there.
    """
    problems = Problems()
    if files:
        problems.attempt(check_files, section.class_order, section.class_map)
    path = problems.attempt(data_path, section)
    if path is not None:
        for split in splits:
            problems.attempt(check_split_exists, path, split)
    problems.check()


def check_device(device: str) -> None:
    """Refuse a device that is not here; processes that torchrun started find theirs when they meet.

    Raises:
        ConfigError: no such device.
    """
    if not started_by_torchrun():
        pick_device(device)


def check_styles(styles: Sequence[str]) -> None:
    """Refuse styles that there are not.

    Raises:
        ConfigError: an unknown style, or one named twice.
    """
    for style in styles:
        if style not in STYLES:
            raise ConfigError(f"there is no export style {style!r}: choose from {', '.join(STYLES)}")
        if styles.count(style) > 1:
            raise ConfigError(f"`style={style}` is given twice: one file is written per style")


def check_quantize(config: RunConfig, *, images: bool = False, files: bool = True) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Args:
        config: of the run.
        images: whether it needs images; if not, those that are named must be there nevertheless.
        files: whether weights and policy must be there; not where a run is resumed.

    Raises:
        SaqError: all that is wrong, in one message.
    """
    problems = Problems()
    problems.attempt(check_model, config.model, files=files)
    if images or config.data.path is not None:
        problems.attempt(check_images, config.data, "train", "val", files=files)
    if config.search.proxy is not None:
        problems.attempt(check_images, proxy_data(config), "train", files=files)
    problems.attempt(check_way, config.quantization)
    problems.attempt(check_bits, config.quantization, files=files)
    problems.attempt(make_searcher, config)
    problems.attempt(scheme_of(config).check)
    problems.attempt(check_training, config)
    problems.attempt(check_device, config.run.device)
    if config.model.new_head and not config.training.epochs:
        problems.add(
            ConfigError(
                "`model.new_head` starts a random classifier, which fine-tuning trains: remove `training.epochs=0`"
            )
        )
    problems.attempt(check_styles, config.export.styles)
    check_builds(problems, config.model)
    problems.check()


def check_search(config: RunConfig, *, images: bool = True, files: bool = True) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Args:
        config: of the search.
        images: whether it needs images; if not, those that are named must be there nevertheless.
        files: whether weights must be there; not where a search is resumed, which may have ended.

    Raises:
        SaqError: all that is wrong, in one message.
    """
    section, problems = config.quantization, Problems()
    problems.attempt(check_model, config.model, files=files and config.search.proxy is None)
    data = config.data if config.search.proxy is None else proxy_data(config)
    if images or data.path is not None:
        problems.attempt(check_images, data, "train", files=files)
    if section.bits is not None or section.policy is not None:
        problems.add(
            ConfigError(
                "`quantization.bits` and `quantization.policy` give the bits, so there is nothing to search: "
                "remove them"
            )
        )
    elif section.bops is None and section.size is None:
        problems.add(
            ConfigError("no budget was given: use `quantization.bops=34G`, `quantization.size=5MB`, or both")
        )
    problems.attempt(check_bits, section, files=False)
    problems.attempt(make_searcher, config)
    problems.attempt(scheme_of(config).check)
    problems.attempt(make_optimizer, nn.Linear(1, 1, device="meta"), search_training(config))
    problems.attempt(check_device, config.run.device)
    check_builds(problems, config.model)
    problems.check()


def network_for(config: RunConfig, loaded: LoadedModel) -> Network:
    """The network, wrapped and traced, once bits, budget and distillation are known to suit it.

    Raises:
        SaqError: a policy of another network, a budget that nothing meets, no float model to learn from.
    """
    if config.training.distill and not loaded.trained:
        raise ConfigError(
            f"`training.distill` learns from the float model, and the weights of {loaded.name} are random, or "
            "those of its classifier: use `model.weights=FILE` with all of them, or remove `training.distill`"
        )
    network = wrap_and_trace(loaded, quantize_attention=config.quantization.quantize_attention)
    if given_policy(config.quantization, network) is None:
        space_of(config.quantization, network).check_reachable(budget_of(config.quantization, network))
    return network


def check_trainable(config: RunConfig, prepared: Prepared) -> None:
    """Refuse a network that fine-tuning cannot train; on the images that it is trained on.

    Raises:
        UnsupportedModel: it fails in training, or returns something else than class scores.
    """
    network, images = prepared
    if config.training.epochs:
        count = images.train.images
        check_trains(network.model, network.name, network.loaded.preprocessing, config, images=count)
