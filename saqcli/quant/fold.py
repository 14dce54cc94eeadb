"""What a network must be before it is wrapped: Python modules whose weights are plain float32 parameters.

Parametrizations (``weight_norm``, ``spectral_norm``, ``orthogonal``, one's own) and pruning masks compute a weight from
other tensors in every pass. Training moves the quantized weight itself, so the value that they have is made a plain
parameter: the function stays, the constraint does not. Pruned zeros are weights like others from then on.

A layer that cannot be quantized as it is stays in floating point, with a reason; a network that cannot be traced or
exported at all is refused here, before anything is spent on it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as remove_pruning
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from saqcli.errors import UnsupportedModel
from saqcli.quant.layer import WRAPPED
from saqcli.quant.wrapping import own_type, reason_for_float

NAMED = 5  # layers that a note names
_HOOKS: tuple[
    tuple[type, Callable[..., Any], str], ...
] = (  # with what undoes them, and where they keep the name
    (WeightNorm, remove_weight_norm, "name"),
    (SpectralNorm, remove_spectral_norm, "name"),
    (BasePruningMethod, remove_pruning, "_tensor_name"),
)
HALF = (torch.float16, torch.bfloat16)  # in which neither runtimes on a CPU nor exact sums can compute


def make_plain(model: nn.Module) -> list[str]:
    """Fold parametrizations and pruning masks of ``model`` into its weights, in place; what was done, a line each.

    A network none of whose weights is float32 is converted to float32.
    """
    notes = []
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if types and torch.float32 not in types:
        model.float()
        notes.append(f"weights converted from {', '.join(sorted(map(_name, types)))} to float32")
    folded = [name or "the network" for name, module in list(model.named_modules()) if fold(module)]
    if folded:
        more = f" and {len(folded) - NAMED} more" if len(folded) > NAMED else ""
        notes.append(
            f"parametrization or pruning of {', '.join(folded[:NAMED])}{more} folded into plain weights, which "
            "training moves freely"
        )
    for name, module in model.named_modules():
        if (
            isinstance(module, WRAPPED)
            and reason_for_float(module) is None
            and own_type(module) != torch.float32
        ):
            notes.append(f"{name} is quantized in float32, and returns {_name(own_type(module))} as before")
    return notes


def check_modules(model: nn.Module) -> None:
    """Refuse what can be neither traced nor exported.

    Raises:
        UnsupportedModel: TorchScript, a weight without values, layers of half precision, a state that is no tensor, or
            a name of two lines.
    """
    for name, module in model.named_modules():
        if len(name.splitlines()) > 1:
            raise UnsupportedModel(
                f"the name of submodule {name!r} has a line break, which graphs cannot have: rename it"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"{name or 'the network'} is a TorchScript module, whose operators cannot be seen: use the Python "
                "module that it was made from"
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            place = f"{name}.{key}".lstrip(".")
            if tensor is not None and is_lazy(tensor):
                raise UnsupportedModel(
                    f"{place} is lazy and has no shape yet: run the network on an image first"
                )
            if tensor is not None and tensor.is_meta:
                raise UnsupportedModel(
                    f"{place} is on the meta device and has no values: load the weights first"
                )
            half = tensor is not None and tensor.dtype in HALF and key in module._parameters
            if half and not (isinstance(module, WRAPPED) and reason_for_float(module) is None):
                raise UnsupportedModel(
                    f"{place} is in half precision in a network of float32, which exported files cannot compute "
                    "with: convert the layer with .float()"
                )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UnsupportedModel(
                f"{name} of the network's state is a {kind}, where files hold tensors alone"
            )


def fold(module: nn.Module) -> bool:
    """Make every weight of ``module`` that is computed from others a plain parameter; whether there was one."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    any_module: Any = module
    hooks = list(module._forward_pre_hooks.values())
    hooks.sort(
        key=lambda hook: not isinstance(hook, BasePruningMethod)
    )  # what is pruned may be another's tensor
    names = list(any_module.parametrizations) if parametrize.is_parametrized(module) else []
    found = False
    with _in_eval(module):
        for hook in hooks:
            for kind, remove, tensor in _HOOKS:
                if isinstance(hook, kind):
                    remove(module, getattr(hook, tensor))
                    found = True
            if isinstance(hook, SpectralNorm):
                _forget_loading(module)
        for name in names:
            value: Tensor = getattr(module, name).detach().clone()
            trained = any(each.requires_grad for each in any_module.parametrizations[name].parameters())
            parametrize.remove_parametrizations(module, name)
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(value, trained))
    return found or bool(names)


def _forget_loading(module: nn.Module) -> None:
    """Remove what spectral norm does when a state is loaded; torch 2.11 to 2.15 leaves it behind."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Within the context ``module`` is in eval mode, where reading a weight does not change it."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
