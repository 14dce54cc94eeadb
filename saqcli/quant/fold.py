"""Parametrizations and pruning masks folded into plain float32 weights.

Parametrizations (``weight_norm``, ``spectral_norm``, ``orthogonal``, custom ones) and pruning masks compute a weight
from other tensors in every pass. Training updates the weight itself, so the current value becomes a plain parameter:
the function stays the same, the constraint is dropped. Pruned zeros are ordinary weights from then on.

A layer that cannot be quantized stays in floating point, with a reason. A network that can be neither traced nor
exported is refused here, before any expensive step.
"""

from collections.abc import Callable
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
from saqcli.quant.layer import WRAPPED, in_eval_mode
from saqcli.quant.wrapping import reason_for_float, weight_dtype

NAMED = 5  # most layers that a note names
# Hooks, the function that removes each, and the attribute that holds the name of the weight.
_HOOKS: tuple[tuple[type, Callable[..., Any], str], ...] = (
    (WeightNorm, remove_weight_norm, "name"),
    (SpectralNorm, remove_spectral_norm, "name"),
    (BasePruningMethod, remove_pruning, "_tensor_name"),
)
HALF = (torch.float16, torch.bfloat16)  # unsupported by CPU runtimes and by exact sums


def make_plain(model: nn.Module) -> list[str]:
    """Fold parametrizations and pruning masks of ``model`` into its weights, in place.

    A network without any float32 weight is converted to float32.

    Returns:
        A note of one line for each change.
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
            "training updates freely"
        )
    for name, module in model.named_modules():
        if (
            isinstance(module, WRAPPED)
            and reason_for_float(module) is None
            and weight_dtype(module) != torch.float32
        ):
            notes.append(
                f"{name} is quantized in float32, and returns {_name(weight_dtype(module))} as before"
            )
    return notes


def check_modules(model: nn.Module) -> None:
    """Refuse networks that can be neither traced nor exported.

    Raises:
        UnsupportedModel: TorchScript, a weight without values, layers in half precision, a non-tensor state, or a
            name with a line break.
    """
    for name, module in model.named_modules():
        if len(name.splitlines()) > 1:
            raise UnsupportedModel(
                f"the name of submodule {name!r} has a line break, which graphs do not allow: rename it"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"{name or 'the network'} is a TorchScript module, whose operators cannot be traced: use the Python "
                "module it was compiled from"
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
                    f"{place} is in half precision in a float32 network, which exported files do not support: "
                    "convert the layer with .float()"
                )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UnsupportedModel(f"{name} of the network's state is a {kind}, but files hold only tensors")


def fold(module: nn.Module) -> bool:
    """Turn every computed weight of ``module`` into a plain parameter; return whether there was one."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    any_module: Any = module
    hooks = list(module._forward_pre_hooks.values())
    # pruning first: it may act on the tensor of another hook
    hooks.sort(key=lambda hook: not isinstance(hook, BasePruningMethod))
    names = list(any_module.parametrizations) if parametrize.is_parametrized(module) else []
    found = False
    if names:
        _separate_class(module)
    with in_eval_mode(module):  # reading a weight does not change it there
        for hook in hooks:
            for kind, remove, tensor in _HOOKS:
                if isinstance(hook, kind):
                    remove(module, getattr(hook, tensor))
                    found = True
            if isinstance(hook, SpectralNorm):
                _remove_load_hook(module)
        for name in names:
            value: Tensor = getattr(module, name).detach().clone()
            trained = any(each.requires_grad for each in any_module.parametrizations[name].parameters())
            parametrize.remove_parametrizations(module, name)
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(value, trained))
    return found or bool(names)


def _separate_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: copies of a module share it, and removal changes the class."""
    kind = type(module)
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, members)


def _remove_load_hook(module: nn.Module) -> None:
    """Remove the hook of spectral norm that runs when a state is loaded; torch 2.11 to 2.15 do not remove it."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
