"""The model in one safetensors file: packed integer codes, steps, the float remainder, and ``ModelFacts``.

    NAME.codes       weight codes, packed into exactly their bits (see ``quant.packing``)
    NAME.step        what a code is worth, per output channel or one; value = step * code
    everything else  under its own name in the model's state: biases, norms, clipping levels, unquantized
    weights

Weight quantizers are saved, and loaded, in their plain form (``convert.fold``). Loading builds the float
architecture, wraps it, and puts ``step * code`` where the float weight was. Quantizing that again gives the same
codes, so the loaded model equals the saved one bit for bit. No code is ever read from the file.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saqcli.algorithms.exporters.facts import ModelFacts
from saqcli.errors import CorruptArtifact, SaqError
from saqcli.quant import convert
from saqcli.quant.layers import QuantizedLayer, quantized_layers, stores_codes
from saqcli.quant.packing import pack, unpack
from saqcli.quant.quantizers import Quantizer
from saqcli.strict import parse_json

FORMAT = "saq.model"


class SafetensorsExporter:
    """Writes the whole model, to be evaluated or exported further by ``saq``."""

    suffix = ".safetensors"

    def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelFacts) -> None:
        """Write ``path``; ``example`` is not needed."""
        model = copy.deepcopy(model)
        convert.fold(model)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        for name, layer in quantized_layers(model).items():
            quantizer = layer.weight_quantizer
            if stores_codes(layer) and isinstance(quantizer, Quantizer):
                del state[f"{name}.{layer.weight_name}"]
                codes = quantizer.codes(layer.latent_weight())
                state[f"{name}.codes"] = pack(codes, quantizer.grid(), quantizer.bits)
                state[f"{name}.step"] = quantizer.step().detach().cpu().flatten()
        metadata = {"format": FORMAT, "facts": facts.model_dump_json()}
        save_file({name: value.clone() for name, value in state.items()}, path, metadata=metadata)


def read_facts(path: Path) -> ModelFacts:
    """The description in a file written by ``SafetensorsExporter``.

    Raises:
        CorruptArtifact: not such a file, damaged, or of another version.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptArtifact(f"{path} cannot be read as safetensors: {error}") from None
    if metadata.get("format") != FORMAT:
        raise CorruptArtifact(
            f"{path} holds no quantized model of saq: give a run directory, or the model.safetensors in its artifacts/"
        )
    return parse_json(ModelFacts, metadata.get("facts", ""), str(path), CorruptArtifact)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, by name.

    Raises:
        CorruptArtifact: truncated or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptArtifact(f"{path} cannot be read as safetensors: {error}") from None


def rebuild(model: nn.Module, facts: ModelFacts, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Turn the float architecture ``model`` into the quantized model that was saved, in place.

    Raises:
        CorruptArtifact: the description contradicts itself or the architecture, or tensors are missing, left over or of
            another shape.
    """
    try:
        restore_structure(model, facts)
        convert.fold(model)
    except SaqError as error:
        raise CorruptArtifact(f"{source} describes a model that cannot be built: {error}") from None
    state = dict(tensors)
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        if stores_codes(layer) and isinstance(quantizer, Quantizer) and f"{name}.codes" in state:
            try:
                state[f"{name}.{layer.weight_name}"] = _weight(state, name, layer, quantizer)
            except CorruptArtifact as error:
                raise CorruptArtifact(f"{source}, layer {name}: {error}") from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CorruptArtifact(f"{source} does not fit {facts.policy.model}: {detail}") from None
    return model.eval()


def _weight(state: dict[str, Tensor], name: str, layer: QuantizedLayer, quantizer: Quantizer) -> Tensor:
    """``step * code`` of one layer, both taken out of ``state``."""
    grid, shape = quantizer.grid(), tuple(layer.latent_weight().shape)
    packed, step = state.pop(f"{name}.codes"), state.pop(f"{name}.step", None)
    prefix = f"{name}.weight_quantizer."
    try:
        quantizer.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        )
    except RuntimeError:
        raise CorruptArtifact("what its quantizer needs is missing or of another shape") from None
    expected = quantizer.step().detach()
    if step is None or step.shape != expected.flatten().shape or not torch.allclose(step, expected.flatten()):
        raise CorruptArtifact("the steps of the codes do not belong to its grid and clipping level")
    return unpack(packed, grid, quantizer.bits, shape) * expected


def restore_structure(model: nn.Module, facts: ModelFacts) -> None:
    """Wrap the float architecture and install quantizers as ``facts`` tell, levels unset, in place.

    Raises:
        SaqError: they tell of layers that the architecture does not have.
    """
    layers = convert.wrap(model)
    modules = dict(model.named_modules())
    for parent, children in facts.routed.items():
        if parent not in modules or not set(children) <= set(layers) & set(facts.policy.layers):
            raise CorruptArtifact(f"it has no {parent} that multiplies with {', '.join(children)}")
    convert.leave_float(model, [name for name in layers if name not in facts.policy.layers])
    for parent, children in facts.routed.items():
        convert.route(model, [parent], children)
    convert.install(model, facts.scheme, facts.policy, facts.signed)
