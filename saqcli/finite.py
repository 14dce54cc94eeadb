"""Finding NaN, infinite or otherwise invalid values in a model's tensors.

A single NaN weight makes every output NaN.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def invalid_tensor(model: nn.Module, sources: Mapping[str, Tensor] | None = None) -> str | None:
    """The first invalid tensor of ``model`` and what is wrong with it; None if all are valid.

    Parameters and running statistics must be finite, and variances not negative. Other buffers may be infinite, such as
    attention masks.

    Args:
        model: with all its weights.
        sources: the tensors that the weights were copied from, by name, to detect overflow in the copy.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or not _has_numbers(tensor):
            continue
        statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
        if wrong := _invalid_values(tensor.detach(), infinite=name in parameters or statistic):
            source = (sources or {}).get(name)
            if (
                source is not None
                and source.dtype != tensor.dtype
                and not _invalid_values(source, infinite=True)
            ):
                wrong += f" once it is converted from {_type(source)} to {_type(tensor)}"
            return f"{name} {wrong}"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} has negative variances ({int((tensor < 0).sum())} of {tensor.numel()})"
    return None


def _has_numbers(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0 and not tensor.is_meta


def _invalid_values(tensor: Tensor, *, infinite: bool) -> str:
    """Description of the invalid values in ``tensor``, to follow its name; empty if there are none."""
    if bool(tensor.isfinite().all()):
        return ""
    for kind, found in (("NaN", tensor.isnan()), ("infinite", tensor.isinf())):
        if bool(found.any()) and (kind == "NaN" or infinite):
            return f"has {kind} values ({int(found.sum())} of {tensor.numel()})"
    return ""


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
