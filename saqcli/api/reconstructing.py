"""Better quantized modules from unlabelled data: closed-form compensation, and reconstruction block by block.

Both compare the module with its float network. ``quantize_model`` leaves the float weights in the module and notes what
its corrections changed, so that the float network is known until the weights change.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from torch import nn

from saqcli.api.batches import BatchReader, Calls, Inputs
from saqcli.api.info import attach, info, quantization_of, unwrapped
from saqcli.api.networks import copied, restore_means
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert
from saqcli.quant.layer import quantized_layers
from saqcli.quant.short_steps.absorb import absorb_norms, absorbed_norms
from saqcli.reconstruction import compensation
from saqcli.reconstruction import reconstruct as loop
from saqcli.reconstruction.block import BlockError
from saqcli.reconstruction.compensation import Compensation
from saqcli.reconstruction.options import Reconstruction

SAMPLES = 1024  # by default


def reconstruct(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    iterations: int = 150,
    float_model: nn.Module | None = None,
    inputs: Inputs | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress = SILENT,
    **options: Any,
) -> list[BlockError]:
    """Fit every block of a quantized module to the float network's, in place, on data without labels.

    Takes minutes where ``finetune`` takes hours, and recovers most of what calibration loses at 4 bits and below.
    Blocks are found from the flow of tensors: a whole residual block, or a layer with its norm and activation.

    Args:
        model: from ``quantize_model``; its mode is restored.
        calibration: batches as in ``quantize_model``; labels are not needed.
        iterations: steps of each block; with 0 nothing changes.
        float_model: the float module, where the weights of ``model`` have changed since ``quantize_model``: after
            ``compensate``, ``reconstruct`` or training, or for a module from a file. It is not changed.
        inputs: as in ``quantize_model``.
        samples: read until this many samples, whole batches.
        seed: of all random numbers.
        progress: one task a block.
        options: further fields of ``saqcli.reconstruction.options.Reconstruction``, such as ``batch_size`` or ``drop``.

    Returns:
        ``name``, ``before`` and ``after`` of every block in order: its mean squared error relative to the variance of
        the float block's output. ``after`` is never above ``before``.

    Raises:
        ConfigError: the module is not quantized, an option is unknown or impossible, or the float network is gone.
        DataError: the loader is empty, or its batches do not hold the module's arguments.
        UnsupportedModel: the samples have different sizes, or are lists.

    Example:
        >>> import torch, saqcli as saq
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> data = [torch.rand(32, 8)]
        >>> quantized = saq.quantize_model(net, 3, calibration=data)
        >>> errors = saq.reconstruct(quantized, data, iterations=20)
        >>> [error.name for error in errors], all(error.after <= error.before for error in errors)
        (['0', '2'], True)
    """
    chosen = _options(iterations, options)
    module, in_float, calls = _ready(model, calibration, float_model, inputs, samples)
    errors = loop.reconstruct(module, in_float, calls, chosen, seed=seed, progress=progress)
    if iterations:
        _forget_float(module)
    return errors


def compensate(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    float_model: nn.Module | None = None,
    inputs: Inputs | None = None,
    samples: int = SAMPLES,
    progress: Progress = SILENT,
) -> Compensation:
    """Correct scale and mean of every channel of a quantized module in closed form, in place, without labels.

    Takes seconds. The corrections are folded into norms, biases and levels, so that the network gains no operator.

    Args:
        model: from ``quantize_model``; its mode is restored.
        calibration: batches as in ``quantize_model``; labels are not needed.
        float_model: as in ``reconstruct``.
        inputs: as in ``quantize_model``.
        samples: read until this many samples, whole batches.
        progress: reports the batches.

    Raises:
        ConfigError: the module is not quantized, or the float network is gone.
        DataError: the loader is empty, or its batches do not hold the module's arguments.

    Example:
        >>> import torch, saqcli as saq
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> data = [torch.rand(32, 8)]
        >>> quantized = saq.quantize_model(net, 3, calibration=data)
        >>> found = saq.compensate(quantized, data)
        >>> found.after <= found.before
        True
    """
    module, in_float, calls = _ready(model, calibration, float_model, inputs, samples)
    found = compensation.compensate(module, in_float, calls, progress=progress)
    _forget_float(module)
    return found


def _options(iterations: int, options: dict[str, Any]) -> Reconstruction:
    known = [each.name for each in fields(Reconstruction)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"reconstruction has no option {unknown[0]!r}: choose from {', '.join(known)}")
    return Reconstruction(iterations=iterations, **options)


def _ready(
    model: nn.Module,
    calibration: Iterable[Any],
    float_model: nn.Module | None,
    inputs: Inputs | None,
    samples: int,
) -> tuple[nn.Module, nn.Module, Calls]:
    """The quantized module, its float network, and the calls on the calibration data."""
    module = quantization_of(model)[0]
    in_float = _float_network(module) if float_model is None else _with_weights_of(module, float_model)
    return module, in_float, Calls(calibration, BatchReader(module, inputs), samples)


def _float_network(module: nn.Module) -> nn.Module:
    """The float network of a quantized module whose weights have not changed.

    Raises:
        ConfigError: they have.
    """
    made = copied(module)
    if not restore_means(made):
        raise ConfigError(
            f"{info(module).name} is compared with its float network, and training, compensation and reconstruction "
            "replace those weights, and files do not hold them: give `float_model`, the float module"
        )
    return loop.without_quantizers(made)


def _with_weights_of(module: nn.Module, float_model: nn.Module) -> nn.Module:
    """The float network of a quantized module, with the weights of another one.

    Raises:
        ConfigError: that is another network.
    """
    given = copied(unwrapped(float_model))
    if any(layer.bits.weight or layer.bits.activation for layer in quantized_layers(given).values()):
        raise ConfigError("`float_model` is quantized: give the float module")
    made = loop.without_quantizers(module)
    try:
        if not quantized_layers(given):
            convert.wrap(given)
        if absorbed_norms(module) and not absorbed_norms(given):
            absorb_norms(given, quantization_of(module)[2].example)
        made.load_state_dict(given.state_dict())
    except (RuntimeError, UnsupportedModel) as error:
        raise ConfigError(
            f"`float_model` is not the float module of {info(module).name}: {str(error).splitlines()[0]}"
        ) from error
    device = next(module.parameters()).device
    return made.to(device)


def _forget_float(module: nn.Module) -> None:
    """Note that the weights of a module are no longer those of its float network."""
    about = info(module)
    assert about.quantization is not None
    attach(module, replace(about, quantization=replace(about.quantization, corrected=None)))
