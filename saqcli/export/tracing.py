"""Tracing of a frozen model to an ONNX graph, and saving of graphs."""

import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saqcli.errors import ExportMismatch, UnsupportedModel, out_of_memory
from saqcli.export.operators import PLACEHOLDERS
from saqcli.quant.products import ATTENTION

OPSET = 21  # the first one with INT4 and INT16 in DequantizeLinear
IR_VERSION = 10  # of opset 21; current runtimes refuse newer ones
INPUT, OUTPUT = "images", "logits"
MAX_BATCH = 65536
RANDOM = {
    *("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
    "RandomUniformLike",
}
CANNOT_EXPORT = "the model cannot be exported to ONNX: "
_FIXED_BATCH = "it works for one batch size only"


def program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """``model`` as a graph of ATen operators with a dynamic batch.

    Args:
        model: in eval mode, on the CPU.
        example: images (N, C, H, W).

    Raises:
        UnsupportedModel: the model cannot be traced.
    """
    with _quiet(), _as_unsupported(), _FourDimensions():
        return torch.export.export(
            _with_named_input(model), (_at_least_two(example),), dynamic_shapes=({0: _batch()},)
        )


def onnx_graph(model: nn.Module, example: Tensor) -> ir.Model:
    """``model`` in ONNX with placeholders, ``images`` to ``logits``; arguments and errors as in ``program``."""
    with _quiet(), _as_unsupported(), _FourDimensions():
        exported = torch.onnx.export(
            _with_named_input(model),
            (_at_least_two(example),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            external_data=False,
            optimize=False,  # takes minutes on a transformer; the required passes follow
            custom_translation_table=PLACEHOLDERS,
            dynamic_shapes=({0: _batch()},),
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    assert exported is not None
    graph: ir.Model = exported.model
    shape = graph.graph.inputs[0].shape
    if shape is None or isinstance(shape[0], int):
        raise UnsupportedModel(f"{CANNOT_EXPORT}{_FIXED_BATCH}")
    fold_constants(graph, onnx_shape_inference=False)
    for clean in (
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveUnusedNodesPass(),
    ):
        clean(graph)
    _drop_zero_biases(graph.graph)
    drawn = sorted({node.op_type for node in graph.graph} & RANDOM)
    if drawn:
        raise UnsupportedModel(
            f"{CANNOT_EXPORT}its forward draws random numbers also in eval mode ({', '.join(drawn)})"
        )
    return graph


def _with_named_input(model: nn.Module) -> nn.Module:
    """A model with one named input: dynamic sizes are not supported for ``*args``, as routed models have."""
    taken = inspect.signature(model.forward).parameters.values()
    return _NamedInput(model) if any(each.kind is each.VAR_POSITIONAL for each in taken) else model


class _NamedInput(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.model(images)
        return logits


class _FourDimensions(TorchFunctionMode):
    """Reshapes operands of torch's attention to the dimensions that the exporter expects, (N, heads, L, E).

    Window attention has five dimensions in some networks (NesT, Twins).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; attention with reshaped operands."""
        kwargs = kwargs or {}
        if func is not ATTENTION or len(args) < 3 or args[0].dim() == 4:
            return func(*args, **kwargs)
        query, key, value, *rest = args
        mask = rest[0] if rest else kwargs.get("attn_mask")
        if mask is not None:
            mask = self._flat(mask.expand(*query.shape[:-1], key.shape[-2]))
            rest = [mask, *rest[1:]]
            kwargs = {name: given for name, given in kwargs.items() if name != "attn_mask"}
        answer: Tensor = func(self._flat(query), self._flat(key), self._flat(value), *rest, **kwargs)
        return answer.reshape(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, x.dim() - 4)


def _drop_zero_biases(graph: ir.Graph) -> None:
    """Remove the zero bias that the exporter adds to every convolution without bias."""
    for node in graph:
        bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None and not bias.const_value.numpy().any():
            node.resize_inputs(2)


def save(graph: ir.Model, path: Path, properties: dict[str, str], version: str) -> None:
    """Clean ``graph``, write it and check the file.

    Args:
        graph: without placeholders.
        path: path of the file.
        properties: metadata of the file.
        version: version of saq.
    """
    for clean in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        clean(graph)
    for node in graph.graph:
        node.metadata_props.update(node.meta.get(ANNOTATIONS, {}))
    graph.ir_version = IR_VERSION
    graph.producer_name, graph.producer_version = "saq", version
    graph.metadata_props.update(properties)
    ir.save(graph, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportMismatch(
            f"the exported graph is not valid ONNX ({reason}); no file was written"
        ) from None


ANNOTATIONS = "saq"  # key in ``node.meta`` of the entries that ``save`` writes to the node's metadata


def _at_least_two(example: Tensor) -> Tensor:
    """At least two images, since a batch of one would be treated as a constant."""
    example = example.cpu()
    return example if len(example) > 1 else example.expand(2, *example.shape[1:]).contiguous()


def _batch() -> Any:
    return torch.export.Dim("batch", min=1, max=MAX_BATCH)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress logs, warnings and output of torch; errors contain the reason."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _as_unsupported() -> Iterator[None]:
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:  # the exporter raises whatever the model's code raised
        if out_of_memory(error):
            raise
        raise UnsupportedModel(f"{CANNOT_EXPORT}{_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first cause of an error in one line, in plain words if known."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if missing:
        return f"ONNX has no form of its operator {missing[1].replace('.', '::')}"
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return "its forward depends on the values of a tensor, while a graph is the same for all values"
    if "specialized it to be a constant" in text:
        return _FIXED_BATCH
    first = (text.splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300] if first else type(error).__name__
