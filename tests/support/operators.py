"""A cache for what PyTorch's ONNX exporter reads anew in every export."""

import functools
import sys
from typing import Any, Callable  # noqa: UP035


def read_once() -> bool:
    """Read the source and signatures of 500 ONNX operators once, and list PyTorch's own once.

    Every export repeats this, which for small networks takes longer than the rest.

    Returns:
        Whether anything was done: the exporter is imported and not yet cached.
    """
    registration: Any = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is None or "onnxscript" not in sys.modules:
        return False
    apis = registration.onnxscript_apis
    if hasattr(apis.get_torchlib_ops, "cache_info"):
        return False
    apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)
    for name in ("exported_program", "decomp_utils"):
        module = sys.modules[f"torch.export.{name}"]
        for listed in ("_collect_all_valid_cia_ops", "_collect_all_valid_cia_ops_for_aten_namespace"):
            if hasattr(module, listed):
                setattr(module, listed, functools.cache(getattr(module, listed)))
    schemas: Any = sys.modules["torch.onnx._internal.exporter._schemas"]
    schemas.op_signature_from_function = functools.cache(schemas.op_signature_from_function)
    # It annotates 10,000 inner functions: typing caches, collections.abc does not.
    sys.modules["torch._ops"].Callable = Callable  # type: ignore[attr-defined]
    return True
