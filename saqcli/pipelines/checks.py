"""What can be seen to be wrong with a command before anything is fetched or loaded.

Every command collects what its checks find and tells all of it at once: missing images beside a typing mistake
in ``training.method``. Whether a run directory is there already is looked at after that; weights and images come last.
"""

from typing import Literal

import torch

from saqcli.config import DataSection, ModelSection
from saqcli.data.datasets import check_there
from saqcli.data.splits import named_data
from saqcli.errors import ConfigError, Problems, SaqError
from saqcli.models.arguments import check_arguments
from saqcli.models.load import check_named
from saqcli.pipelines.setup import answering, load_float
from saqcli.pipelines.targets import check_not_run
from saqcli.process_group import pick_device, started_by_torchrun
from saqcli.progress import SILENT
from saqcli.quant.tracer import try_model
from saqcli.serialization import named_path
from saqcli.tasks.labels import check_files


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
    check_named(name)


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
    path = problems.attempt(named_data, section)
    if path is not None:
        for split in splits:
            problems.attempt(check_there, path, split)
    problems.check()


def check_device(device: str) -> None:
    """Refuse a device that is not here; processes that torchrun started find theirs when they meet.

    Raises:
        ConfigError: no such device.
    """
    if not started_by_torchrun():
        pick_device(device)
