"""Quantizing any module: bits, quantizers, calibration, corrections.

prepare             a copy of the module, and one call of it
float_network       wrapped and traced on that call
policy              given, uniform, or found by a searcher under a budget
balance_norms       on request: channels of similar ranges behind layer norms
install             quantizers, fitted to calibration data
correct             means and variances of batch norms, biases
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from saqcli.api.accuracy import wanted_accuracy, warn_if_missed
from saqcli.api.arguments import scheme_of
from saqcli.api.batches import BatchReader, Calls, Inputs
from saqcli.api.exporting import try_export
from saqcli.api.info import bits_of, quantization_of
from saqcli.api.networks import (
    CALIBRATION_SAMPLES,
    Policy,
    correct_means,
    float_network,
    install,
    observed,
    policy_of,
    prepare,
    refit,
    restore_means,
)
from saqcli.api.searching import find_bits, search_options
from saqcli.config import WIDTHS
from saqcli.errors import ConfigError
from saqcli.progress import SILENT, Progress
from saqcli.quant import calibration as fitting
from saqcli.quant import convert
from saqcli.quant.calibration import ClipInit
from saqcli.quant.cost import Budget
from saqcli.quant.grid import WeightGrid
from saqcli.quant.quantizers.base import Granularity
from saqcli.reconstruction.norms import balance_norms as balanced
from saqcli.target import Target, deployment_of


def quantize_model(
    model: nn.Module,
    bits: int | str | None = None,
    *,
    policy: Policy | None = None,
    budget: int | str | Budget | None = None,
    max_drop: float | None = None,
    min_top1: float | None = None,
    calibration: Iterable[Any] | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    samples: int = CALIBRATION_SAMPLES,
    searcher: str = "error",
    search: Mapping[str, Any] | None = None,
    candidates: Iterable[int] = WIDTHS,
    pins: Mapping[str, str] | None = None,
    quantizer: str = "clip",
    weight_quantizer: str | None = None,
    activation_quantizer: str | None = None,
    weight_grid: WeightGrid = "auto",
    granularity: Granularity = "channel",
    weight_normalization: bool = False,
    restore_deviation: bool = True,
    clip_init: ClipInit = "error",
    error_power: float = 2.0,
    short_steps: int | None = None,
    quantize_attention: bool = False,
    target: str | Path | Target | None = None,
    junctions: Iterable[str] = (),
    balance_norms: bool = False,
    recalibrate_bn: bool = True,
    correct_bias: bool = False,
    export: str | None = None,
    inplace: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> nn.Module:
    """A quantized copy of ``model``: every convolution and linear layer computes with quantized weights and inputs.

    The copy is an ordinary module: it trains, moves, saves and copies as the float one. Give ``bits``, ``policy`` or
    ``budget``. First layers and classifiers keep 8 bits unless ``policy`` or ``pins`` say otherwise.

    Args:
        model: any float module that runs on its inputs; on any device, in any mode.
        bits: of weights and inputs, 2 to 8: ``4``, or ``"w4a8"``.
        policy: bits of every layer: a ``BitConfig``, its dictionary of layers, or a ``policy.json``.
        budget: bit-operations for one sample (``"34G"``, ``500_000_000``, ``"w4a4"`` for the cost of uniform 4 bits,
            ``"50%"`` of that of uniform 8 bits),
            or a ``Budget``.
        max_drop: budget of accuracy: most points of top-1 that may be lost, measured calibrated on every second of the
            labelled samples of ``calibration``; alone for the fewest bit-operations, or together with ``budget``. If it
            cannot be met, the most accurate configuration is used, and a ``saqcli.errors.AccuracyWarning`` says by how
            much; ``accuracy`` of what ``saqcli.search`` returns has the numbers.
        min_top1: the same as the least top-1 in percent.
        calibration: any iterable of batches: tensors, tuples or dictionaries, with or without labels; see
            ``saqcli.api.batches``. Without it, levels are fitted to ``example`` alone.
        example: inputs to trace the module with; by default the first batch of ``calibration``, or an image of the
            size of the network's preprocessing. A tuple or list holds all arguments of the forward, optional ones too.
        inputs: from a batch to a tensor, a tuple or a dictionary of the module's arguments.
        samples: calibration samples that are read.
        searcher: of a budget, by name; those that need labelled images take them from ``calibration``.
        search: keyword arguments that only ``saqcli.search`` has: ``options``, ``activation_candidates``, ``cost``,
            ``lr`` and ``weight_error``.
        candidates: bit-widths that a search may give to a layer.
        pins: bits by pattern of layer names: ``{"layer4.*": "8", "*.conv1": "3-6", "fc": "w8a4"}``; not with
            ``policy``.
        quantizer: of weights and inputs, by its name in ``saqcli.quant.quantizers.QUANTIZERS``.
        weight_quantizer: of weights, in the place of ``quantizer``.
        activation_quantizer: of inputs, in the place of ``quantizer``.
        weight_grid: levels of weights: ``paper`` (none at zero), ``zero``, or ``auto``: paper up to 7 bits, int8 at 8.
        granularity: one clipping level of a weight per output ``channel``, or per ``tensor``.
        weight_normalization: quantize the weights of convolutions in standard deviations from their mean.
        restore_deviation: multiply normalized weights by their deviation again; False as in the SAQ paper.
        clip_init: levels start at the least quantization ``error``, at the least error of each layer's ``output``, or
            as in the SAQ ``paper``.
        error_power: exponent p of the quantization error, the sum of |e|**p, 1 to 4.
        short_steps: most significant bits of every step, 1 to 8, so that sums are exact in float32 and files of style
            ``qdq`` equal PyTorch to the last bit; batch norms are folded into the layers before them.
        quantize_attention: also quantize products of activations.
        target: where the module will run: a name in ``saqcli.target.TARGETS``, a file of one, or a ``Target``. It adds
            the operators whose operands are quantized, and refuses what it cannot run.
        junctions: kinds of further operators whose operands are quantized, to 8 bits, such as ``("add", "pool")``: the
            keys of ``saqcli.quant.junctions.kinds.KINDS``. With any, all readers of a tensor share its quantizer.
        balance_norms: give the channels of layer norms similar ranges by ratios that the next layers undo; the float
            network stays the same to rounding.
        recalibrate_bn: adapt the running statistics of batch norms to the quantized layers.
        correct_bias: restore the mean output of every layer.
        export: style of ONNX files that the module must be exportable in; checked before calibration.
        inplace: quantize ``model`` itself, which is returned; otherwise it is left unchanged.
        seed: random seed of sample values and of the searcher.
        progress: reports calibration and search.

    Returns:
        The quantized module, in the mode and on the device of ``model``.

    Raises:
        ConfigError: none or several of bits, policy and budget; an unknown name; invalid bits.
        DataError: the loader is empty, or its batches do not hold the module's arguments.
        UnsupportedModel: nothing to quantize, the module does not run, or it cannot be exported as ``export`` asks.
        PolicyMismatch: the policy is that of another network.
        InfeasibleBudget: the budget is below the smallest reachable cost.

    Example:
        >>> import torch, saqcli as saq
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3),
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10))
        >>> q = saq.quantize_model(net, "w4a4", calibration=[torch.rand(8, 3, 16, 16)])
        >>> q(torch.rand(2, 3, 16, 16)).shape, saq.bops(q) < saq.bops(net, example=torch.rand(1, 3, 16, 16))
        (torch.Size([2, 10]), True)
    """
    searches = budget is not None or max_drop is not None or min_top1 is not None
    given = {"bits": bits, "policy": policy, "budget": True if searches else None}
    named = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = f"{' and '.join(named)} were given" if named else "no bits and no budget were given"
        raise ConfigError(f"{found}: give exactly one of `bits`, `policy` and `budget`")
    accuracy = wanted_accuracy(budget, max_drop, min_top1) if searches else None
    options, place = search_options(search or {}), deployment_of(target, junctions)
    scheme = scheme_of(
        quantizer,
        weight_quantizer,
        activation_quantizer,
        weight_grid,
        granularity,
        weight_normalization,
        restore_deviation,
        clip_init,
        error_power,
        place,
        short_steps,
    )
    if export is not None:
        place.check_styles((export,))
    ready = prepare(model, calibration, example, inputs, samples, inplace=inplace)
    modes = {module: module.training for module in ready.model.modules()}
    network = float_network(
        ready.model,
        ready.example,
        quantize_attention=quantize_attention,
        target=place,
        fold_norms=short_steps is not None,
    )
    try:
        chosen = None if searches else policy_of(network, bits=bits, policy=policy, pins=pins)
        if chosen is not None:
            place.check_policy(chosen.layers)
        if export is not None:
            try_export(network, ready.example, scheme, export)
        statistics = observed(network.model, ready.calls, seed, progress, scheme=scheme)
        if chosen is None:
            searched = find_bits(
                network,
                budget,
                None if calibration is None else ready.calls,
                statistics,
                scheme,
                accuracy=accuracy,
                searcher=searcher,
                candidates=candidates,
                target=place,
                pins=pins,
                seed=seed,
                progress=progress,
                **options,
            )
            chosen = searched.policy
            warn_if_missed(searched.accuracy)
        if balance_norms:
            folded = balanced(network.model, ready.calls, chosen, scheme, seed=seed, progress=progress)
            if any(each.folded for each in folded):
                statistics = observed(network.model, ready.calls, seed, progress)
    except BaseException:
        convert.unwrap(network.model)  # matters in place
        raise
    install(network, ready.example, scheme, chosen, statistics, ready.arguments)
    correct_means(network.model, ready.calls, biases=correct_bias, norms=recalibrate_bn, progress=progress)
    for module, training in modes.items():
        module.training = training
    return network.model


def calibrate(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    inputs: Inputs | None = None,
    samples: int = CALIBRATION_SAMPLES,
    recalibrate_bn: bool | None = None,
    correct_bias: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> None:
    """Fit all levels, steps and offsets of a quantized module anew, in place; bits and weights stay.

    For a module that was quantized with an example alone, or whose data have changed. The result is what
    ``quantize_model`` gives with these data. After training the fit gives up what the levels have learned.

    Args:
        model: from ``quantize_model`` or ``load``.
        calibration: as in ``quantize_model``.
        inputs: as in ``quantize_model``.
        samples: as in ``quantize_model``.
        recalibrate_bn: as in ``quantize_model``; None for wherever that is possible: not after training, and not for a
            module from a file, since the float network that it compares with is gone.
        correct_bias: as in ``quantize_model``, where that is possible.
        seed: random seed of sample values.
        progress: reports the calibration.

    Raises:
        ConfigError: the module is not quantized, or corrections are impossible.
        DataError: the loader is empty, or its batches do not hold the module's arguments.
        UnsupportedModel: the input of a layer is NaN or infinite.
    """
    model, _, quantization = quantization_of(model)
    policy = bits_of(model)
    calls = Calls(calibration, BatchReader(model, inputs), samples)
    in_float = restore_means(model)
    if not in_float and (recalibrate_bn or correct_bias):
        raise ConfigError(
            "means are corrected by comparison with the float network, which training has replaced and files do not "
            "hold: remove `recalibrate_bn` and `correct_bias`"
        )
    with fitting.in_floating_point(model):
        statistics = observed(model, calls, seed, progress, scheme=quantization.scheme)
    refit(model, policy, statistics)
    if in_float:
        norms = recalibrate_bn is not False
        correct_means(model, calls, biases=correct_bias, norms=norms, progress=progress)
