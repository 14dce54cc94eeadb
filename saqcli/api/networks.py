"""From a module to a traced network, and from bits to installed quantizers: what the library shares."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.api.batches import BatchReader, Calls, Inputs, class_scores, device_of, example_arguments
from saqcli.api.info import Quantization, attach, info, unwrapped
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.progress import Progress
from saqcli.quant import calibration as fitting
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits, parse_bits
from saqcli.quant.calls import Call
from saqcli.quant.convert import Scheme
from saqcli.quant.correction import Corrections, correct, correctable
from saqcli.quant.junctions.places import Place
from saqcli.quant.junctions.sharing import Junctions, activation_places
from saqcli.quant.layer import quantized_layers
from saqcli.quant.network import Network, trace_network
from saqcli.quant.quantizers import Quantizer
from saqcli.quant.search_space import Candidates, parse_rules, search_space
from saqcli.quant.tracer import Trace
from saqcli.serialization import parse_json, read_text
from saqcli.target import PAPER, TARGETS, Target
from saqcli.tasks.classification import unfit

CALIBRATION_SAMPLES = 512  # by default
Policy = BitConfig | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Prepared:
    """A float module on its way to quantizers.

    Attributes:
        model: a copy of it, or itself.
        example: one call of it.
        calls: calls on calibration data; on the example alone if there are none.
        arguments: how many arguments the example gave; None if it does not tell.
    """

    model: nn.Module
    example: Call
    calls: Calls
    arguments: int | None = None


def float_network(
    model: nn.Module,
    example: Call,
    *,
    quantize_attention: bool = False,
    target: Target | None = None,
    junctions: Junctions | None = None,
    fold_norms: bool = False,
) -> Network:
    """Wrap and trace a float module, in place; layers whose outputs it returns are pinned, like the first one.

    Args:
        model: of any kind.
        example: one call of it.
        quantize_attention: products of two activations are quantized, and counted, too.
        target: whose kinds of junctions are quantized.
        junctions: that a file records, in the place of those of ``target``.
        fold_norms: batch norms are folded into the layers in front of them first.

    Raises:
        ConfigError: there is no such kind of junctions.
        UnsupportedModel: it has nothing to quantize, or does not run on ``example``.
    """
    about, target = info(model), target or TARGETS[PAPER]
    convert.wrap(model)
    return trace_network(
        model,
        example.first(),
        about.name,
        about.classifiers,
        pin_returned=about.build is None,
        quantize_attention=quantize_attention,
        junctions=junctions or target.junctions,
        junction_bits=target.junction_bits,
        count_junctions=target.count_junctions,
        fold_norms=fold_norms,
    )


def observed(
    model: nn.Module,
    calls: Iterable[Call],
    seed: int,
    progress: Progress,
    total: int = 0,
    *,
    scheme: Scheme | None = None,
) -> dict[str, fitting.InputStatistics]:
    """Input statistics of all layers on ``calls``, with all that the quantizers of ``scheme`` need to start."""
    keep = scheme is not None and scheme.clip_init == "output"
    return fitting.observe(model, reported("calibrating", calls, progress, total), seed, keep=keep)


def install(
    network: Network,
    example: Call,
    scheme: Scheme,
    policy: BitConfig,
    statistics: Mapping[str, fitting.InputStatistics],
    arguments: int | None = None,
) -> nn.Module:
    """Install and fit the quantizers of every layer at the policy's bits, and record them in the module's ``info``."""
    signed = signs_of(statistics)
    convert.install(network.model, scheme, policy, signed)
    fitting.fit(network.model, statistics, scheme.clip_init)
    found = Quantization(
        scheme,
        example.first(),
        network.traced,
        network.costs,
        signed,
        network.products,
        arguments=arguments,
        junctions=network.junctions,
    )
    attach(network.model, replace(info(network.model), quantization=found))
    return network.model


def refit(model: nn.Module, policy: BitConfig, statistics: Mapping[str, fitting.InputStatistics]) -> None:
    """Fit the installed quantizers of a model to other statistics; their parameters stay the same objects."""
    about = info(model)
    assert about.quantization is not None
    found, signed = about.quantization, signs_of(statistics)
    places = [
        *(Place(layer, "weight_quantizer") for layer in quantized_layers(model).values()),
        *activation_places(model).values(),
    ]
    before = [place.quantizer for place in places]
    convert.install(model, found.scheme, policy, signed)
    fitting.fit(model, statistics, found.scheme.clip_init)
    for place, old in zip(places, before, strict=True):
        new = place.quantizer
        if isinstance(old, Quantizer) and isinstance(new, Quantizer) and old is not new:
            old.load_state_dict(new.state_dict())
            old.grids = new.grids
            place.put(old)
    attach(model, replace(about, quantization=replace(found, signed=signed)))


def correct_means(
    model: nn.Module, calls: Iterable[Call], *, biases: bool, norms: bool, progress: Progress
) -> None:
    """Correct biases and running statistics of a quantized model, and record what they were before in its ``info``."""
    about = info(model)
    assert about.quantization is not None
    places = _correctable(model)
    before = {name: value.detach().clone() for name, value in places.items()}
    if biases or norms:
        correct(model, reported("correcting means", calls, progress), biases=biases, norms=norms)
    corrected = {name: (before[name], value.detach().clone()) for name, value in places.items()}
    attach(model, replace(about, quantization=replace(about.quantization, corrected=corrected)))


@torch.no_grad()
def restore_means(model: nn.Module) -> bool:
    """Undo the corrections of calibration; returns False, and changes nothing, if that is impossible.

    It is possible if they are known, and neither biases nor running statistics were changed since.
    """
    about, places = info(model), _correctable(model)
    corrected = about.quantization.corrected if about.quantization else None
    if corrected is None or not all(
        torch.equal(places[name], after.to(places[name])) for name, (_, after) in corrected.items()
    ):
        return False
    for name, (before, _) in corrected.items():
        places[name].copy_(before)
    return True


def _correctable(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that corrections change, by name."""
    names = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
    return {names[id(value)]: value for value in correctable(model)}


def signs_of(statistics: Mapping[str, fitting.InputStatistics]) -> dict[str, bool]:
    """Whether the input of each layer is signed, by layer name."""
    return {name: of_layer.signed for name, of_layer in statistics.items()}


def policy_of(
    network: Network,
    *,
    bits: int | str | None = None,
    policy: Policy | None = None,
    pins: Mapping[str, str] | None = None,
) -> BitConfig:
    """The given bits of every layer, in execution order.

    Raises:
        ConfigError: invalid bits, pins that match no layer, or an unreadable policy.
        PolicyMismatch: the policy is that of another network.
    """
    if policy is not None:
        if pins:
            raise ConfigError("`policy` gives the bits of every layer: edit it, and remove `pins`")
        return in_order(_read_policy(policy, network.name), network)
    return uniform_policy(network, parse_bits(str(bits), "bits"), pins or {})


def uniform_policy(network: Network, bits: LayerBits, pins: Mapping[str, str]) -> BitConfig:
    """``bits`` in every layer that no pin restricts.

    Raises:
        ConfigError: pins that match no layer, or leave a layer without options.
    """
    assert bits.weight is not None
    assert bits.activation is not None
    only = Candidates((bits.weight,), (bits.activation,))
    return search_space(network.name, network.costs, only, parse_rules(pins)).config([])


def float_policy(network: Network) -> BitConfig:
    """Every layer in floating point."""
    unquantized = LayerBits(weight=None, activation=None)
    return BitConfig(model=network.name, layers={layer.name: unquantized for layer in network.costs.layers})


def in_order(policy: BitConfig, network: Network, source: str = "the policy") -> BitConfig:
    """``policy`` in the execution order of the network's layers.

    Raises:
        PolicyMismatch: for another network; ``source`` is the name of the policy in the message.
    """
    names = [layer.name for layer in network.costs.layers]
    policy.check_fits(network.name, names, source)
    return policy.model_copy(update={"layers": {name: policy.layers[name] for name in names}})


def _read_policy(policy: Policy, name: str) -> BitConfig:
    if isinstance(policy, BitConfig):
        return policy
    if isinstance(policy, str | Path):
        return parse_json(BitConfig, read_text(Path(policy), f"the policy {policy}"), str(policy))
    layers = {
        layer: bits if isinstance(bits, LayerBits) else parse_bits(str(bits), f"policy[{layer!r}]")
        for layer, bits in policy.items()
    }
    return BitConfig(model=name, layers=layers)


def prepare(
    model: nn.Module,
    loader: Iterable[Any] | None,
    example: Any,
    inputs: Inputs | None,
    samples: int | None,
    *,
    inplace: bool = False,
) -> Prepared:
    """Copy a float module, and find out how it is called.

    Raises:
        UnsupportedModel: it is quantized already, or cannot be copied.
        ConfigError: nothing tells the inputs of the module.
        DataError: the loader is empty, or its batches do not hold the module's arguments.
    """
    model = unwrapped(model)
    if quantized_layers(model):
        raise UnsupportedModel("this module is quantized already: give the float one, or use calibrate")
    if not inplace:
        model = copied(model)
    arguments = example_arguments(model, example)
    reader = BatchReader(model, inputs, arguments, torch.float32)  # which a module in half precision becomes
    calls = None if loader is None else Calls(loader, reader, samples)
    call = example_of(model, reader, example, calls)
    return Prepared(model, call, calls or Calls([call], reader), arguments)


def example_of(model: nn.Module, reader: BatchReader, example: Any, calls: Calls | None) -> Call:
    """The call to trace a module with: given, the first one of a loader, or an image of its preprocessing.

    Raises:
        ConfigError: nothing tells the inputs of the module.
    """
    if example is not None:
        return reader.call(example)
    if calls is not None:
        return next(iter(calls))
    preprocessing = info(model).preprocessing
    if preprocessing is None:
        raise ConfigError(
            f"the inputs of {info(model).name} are unknown: give `example`, inputs of it, or a loader"
        )
    return random_image(preprocessing.input_size, device_of(model))


def random_image(size: tuple[int, ...], device: Any) -> Call:
    """A call with one random image of ``size``, always the same."""
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    return Call((image.to(device),))


def copied(model: nn.Module) -> nn.Module:
    """A copy of a module, also where it holds weights that hooks have computed (``weight_norm``, pruning).

    Raises:
        UnsupportedModel: an attribute of the module cannot be copied.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, dict[int, Any](computed))
    except Exception as error:  # attributes of foreign modules raise anything
        raise UnsupportedModel(
            f"{info(model).name} cannot be copied ({type(error).__name__}: {error}): give `inplace=True`"
        ) from error


def check_signature(name: str, traced: Trace) -> None:
    """Check that a module maps one image tensor to class scores, as exported files do.

    Raises:
        UnsupportedModel: it takes or returns something else.
    """
    if len(traced.inputs) != 1 or len(traced.inputs[0]) != 3:
        shapes = ", ".join("x".join(map(str, shape)) or "()" for shape in traced.inputs) or "no tensor"
        raise UnsupportedModel(
            f"{name} takes {shapes} for one sample: ONNX files of saq take one image tensor (N, C, H, W); save "
            "the module with saqcli.save, or export a part of it that does"
        )
    if class_scores(traced.outputs) is None:
        raise UnsupportedModel(
            f"{name} returns a {unfit(traced.outputs, 1)}: ONNX files of saq return class scores (N, classes); save "
            "the module with saqcli.save, or export a part of it that does"
        )


def reported(title: str, calls: Iterable[Call], progress: Progress, total: int = 0) -> Iterator[Call]:
    """``calls``, reported to ``progress``."""
    with progress.task(title, total) as task:
        for call in calls:
            yield call
            task.advance(images=call.count)


def corrections_at(model: nn.Module, calls: Calls | None) -> Callable[[], None]:
    """Corrections of batch norms at the current bits, as ``quantize_model`` makes them."""
    if calls is None:
        return lambda: None
    corrections = Corrections(model, biases=False, norms=True)
    kept = list(calls.limited(CALIBRATION_SAMPLES))
    return lambda: corrections(kept)
