"""The model in one safetensors file: packed integer codes, steps, the float remainder, and ``ModelFacts``.

    NAME.codes       weight codes, packed into exactly their bits (see ``quant.packing``)
    NAME.step        what a code is worth, per output channel or one; value = step * code
    everything else  under its own name in the model's state: biases, norms, clipping levels, unquantized
    weights

Weight quantizers are saved, and loaded, in their plain form (``convert.fold``). Loading builds the float
architecture, wraps it, and puts ``step * code`` where the float weight was. Quantizing that again gives the same
codes, so the loaded model equals the saved one bit for bit. No code is ever read from the file.

What is read is judged in this order: header (``damage``), format and version, hash (``envelope``), description
(``facts``), and here whether the tensors are exactly those of the network that it describes.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from saqcli.algorithms.exporters.damage import describe_damage
from saqcli.algorithms.exporters.envelope import check_ours, seal, unseal
from saqcli.algorithms.exporters.facts import ModelFacts
from saqcli.errors import CorruptArtifact, SaqError
from saqcli.finite import flaw
from saqcli.quant import convert
from saqcli.quant.layers import QuantizedLayer, quantized_layers, stores_codes
from saqcli.quant.packing import pack, packed_bytes, unpack
from saqcli.quant.products import OPERANDS, operand_name, split_name
from saqcli.quant.quantizers import Quantizer
from saqcli.quant.special import keeps_products
from saqcli.strict import printable

_NAMED = 3  # tensors that a message lists before it counts


class SafetensorsExporter:
    """Writes the whole model, to be evaluated or exported further by ``saq``; the same model as the same bytes."""

    suffix = ".safetensors"
    conditions: tuple[str, ...] = ()

    def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelFacts) -> None:
        """Write ``path``; ``example`` is not needed."""
        model = copy.deepcopy(model)
        convert.fold(model)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        for name, (layer, quantizer) in _coded_layers(model).items():
            del state[f"{name}.{layer.weight_name}"]
            codes = quantizer.codes(layer.latent_weight())
            state[f"{name}.codes"] = pack(codes, quantizer.grid(), quantizer.bits)
            state[f"{name}.step"] = quantizer.step().detach().cpu().flatten()
        for copy_of in _copies(model):
            del state[copy_of]
        tensors = {name: value.clone() for name, value in state.items()}  # the library refuses shared memory
        path.write_bytes(
            save(tensors, metadata=seal(facts, tensors))
        )  # a full disk is an OSError, as elsewhere


class Content(NamedTuple):
    """What a file holds: its description, and all tensors by name."""

    facts: ModelFacts
    tensors: dict[str, Tensor]


def read_content(path: Path) -> Content:
    """What is in a file written by ``SafetensorsExporter``.

    Raises:
        CorruptArtifact: truncated, damaged, foreign, of a newer version, or changed since it was written.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = check_ours(file.metadata() or {}, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptArtifact(describe_damage(path, str(error))) from None
    return Content(unseal(text, tensors, str(path)), tensors)


def read_facts(path: Path) -> ModelFacts:
    """The description alone; reads and checks the whole file all the same."""
    return read_content(path).facts


def rebuild(model: nn.Module, facts: ModelFacts, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Turn the float architecture ``model`` into the quantized model that was saved, in place.

    Raises:
        CorruptArtifact: the description contradicts itself or the architecture, or tensors are missing, left over, of
            another shape or type, or hold numbers that no quantizer can have.
    """
    try:
        restore_structure(model, facts)
        convert.fold(model)
        _check_fit(_expected(model), tensors, facts.policy.model)
        state = dict(tensors)
        for name, (layer, quantizer) in _coded_layers(model).items():
            state[f"{name}.{layer.weight_name}"] = _weight(state, name, layer, quantizer)
        for copy_of, weight in _copies(model).items():
            state[copy_of] = state[weight]
        own = model.state_dict()  # keeps the versions of modules, which some ask for
        own.update(state)
        model.load_state_dict(own)
        _check_inputs(model)
        if wrong := flaw(model):
            raise CorruptArtifact(f"{wrong}, which no file of saq has")
    except SaqError as error:
        raise CorruptArtifact(
            f"{source} describes a model that cannot be built: {printable(str(error))}"
        ) from None
    except RuntimeError as error:
        raise CorruptArtifact(
            f"{source} does not fit {facts.policy.model}: {printable(str(error))}"
        ) from None
    return model.eval()


def _copies(model: nn.Module) -> dict[str, str]:
    """Weights that are those of another layer, and that layer's, by name; they are stored once."""
    coded = {layer: name for name, (layer, _) in _coded_layers(model).items()}
    return {
        f"{name}.{layer.weight_name}": f"{coded[layer.tied_to[0]]}.{layer.tied_to[0].weight_name}"
        for name, layer in quantized_layers(model).items()
        if layer.tied_to and layer.tied_to[0] in coded
    }


def _coded_layers(model: nn.Module) -> dict[str, tuple[QuantizedLayer, Quantizer]]:
    """The layers whose weights are stored as codes, with their weight quantizers."""
    return {
        name: (layer, layer.weight_quantizer)
        for name, layer in quantized_layers(model).items()
        if stores_codes(layer) and isinstance(layer.weight_quantizer, Quantizer)
    }


def _expected(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor that a file of ``model`` holds."""
    expected = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    for name, (layer, quantizer) in _coded_layers(model).items():
        shape, _ = expected.pop(f"{name}.{layer.weight_name}")
        expected[f"{name}.codes"] = (packed_bytes(shape, quantizer.bits),), torch.uint8
        expected[f"{name}.step"] = (quantizer.step().numel(),), torch.float32
    for copy_of in _copies(model):
        del expected[copy_of]
    return expected


def _check_fit(
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Mapping[str, Tensor], name: str
) -> None:
    """Refuse tensors that are not exactly those expected: torch itself would convert some and let others pass."""
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    other = [
        f"{key} is {_kind(tuple(tensors[key].shape), tensors[key].dtype)} instead of {_kind(*expected[key])}"
        for key in expected
        if key in tensors and (tuple(tensors[key].shape), tensors[key].dtype) != expected[key]
    ]
    problems = [
        f"{title}{', '.join(some[:_NAMED])}{f' and {len(some) - _NAMED} more' if len(some) > _NAMED else ''}"
        for title, some in (("it lacks ", missing), ("nothing takes ", unknown), ("", other))
        if some
    ]
    if problems:
        raise CorruptArtifact(f"its tensors are not those of {name}: {'; '.join(problems)}")


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _weight(state: dict[str, Tensor], name: str, layer: QuantizedLayer, quantizer: Quantizer) -> Tensor:
    """``step * code`` of one layer, both taken out of ``state``."""
    prefix = f"{name}.weight_quantizer."
    packed, step = state.pop(f"{name}.codes"), state.pop(f"{name}.step")
    quantizer.load_state_dict(
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    )
    expected = quantizer.step().detach()
    if not expected.isfinite().all():
        raise CorruptArtifact(f"the clipping level of layer {name} is no finite number")
    if not torch.equal(step, expected.flatten()):
        raise CorruptArtifact(f"the steps of layer {name} do not belong to its grid and clipping level")
    try:
        codes = unpack(packed, quantizer.grid(), quantizer.bits, tuple(layer.latent_weight().shape))
    except CorruptArtifact as error:
        raise CorruptArtifact(f"layer {name}: {error}") from None
    return codes * expected


def _check_inputs(model: nn.Module) -> None:
    """Refuse quantizers with numbers that are none; the sign of a level or step has no meaning, zero is the least."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and not all(
            x.isfinite().all() for x in module.state_dict().values()
        ):
            raise CorruptArtifact(f"{name} has a level, step or offset that is no finite number")


def restore_structure(model: nn.Module, facts: ModelFacts) -> None:
    """Wrap the float architecture and install quantizers as ``facts`` tell, levels unset, in place.

    Raises:
        SaqError: they tell of layers that the architecture does not have.
    """
    modules = dict(model.named_modules())
    layers = convert.wrap(model)
    quantized = set(layers) & set(facts.policy.layers)
    for parent, children in facts.routed.items():
        if parent not in modules or not set(children) <= quantized:
            raise CorruptArtifact(f"it has no {parent} that multiplies with {', '.join(children)}")
    convert.leave_float(model, [name for name in layers if name not in facts.policy.layers])
    for parent, children in facts.routed.items():
        convert.route(model, [parent], children)
    for product, followed in facts.products.items():
        owner, index = split_name(product)
        told = all(operand_name(product, operand) in facts.signed for operand in OPERANDS)
        able = owner in modules and keeps_products(modules[owner])
        if not able or index is None or followed not in quantized or not told:
            raise CorruptArtifact(f"it has no product {product} that could follow {followed}")
    convert.follow(model, facts.products)
    convert.install(model, facts.scheme, facts.policy, facts.signed)
