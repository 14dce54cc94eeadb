"""Whether the numbers of a network are numbers: a NaN in one weight makes every answer NaN, and every search blind."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def flaw(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> str | None:
    """The first tensor of ``model`` that it cannot compute with, and what is wrong with it; None if there is none.

    Parameters and running statistics must be finite, and variances not negative. Other buffers may be infinite, as
    masks of attention are.

    Args:
        model: with all its weights.
        given: what they were copied from, by name, to tell numbers that became infinite on the way.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or not _has_numbers(tensor):
            continue
        statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
        if wrong := _wrong(tensor.detach(), infinite=name in parameters or statistic):
            source = (given or {}).get(name)
            if source is not None and source.dtype != tensor.dtype and not _wrong(source, infinite=True):
                wrong += f" once it is converted from {_type(source)} to {_type(tensor)}"
            return f"{name} {wrong}"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} has negative variances ({int((tensor < 0).sum())} of {tensor.numel()})"
    return None


def _has_numbers(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0 and not tensor.is_meta


def _wrong(tensor: Tensor, *, infinite: bool) -> str:
    """What is wrong with the numbers of ``tensor``, behind its name; empty if nothing is."""
    if bool(tensor.isfinite().all()):
        return ""
    for kind, found in (("NaN", tensor.isnan()), ("infinite", tensor.isinf())):
        if bool(found.any()) and (kind == "NaN" or infinite):
            return f"has {kind} values ({int(found.sum())} of {tensor.numel()})"
    return ""


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
