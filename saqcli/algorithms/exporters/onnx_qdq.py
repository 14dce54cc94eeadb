"""The model as an ONNX graph with QuantizeLinear and DequantizeLinear nodes (style ``qdq``).

    input --Clip--QuantizeLinear--DequantizeLinear--.
                                                     Conv --Add(bias)-- BatchNormalization -- ...
    integer weight (INT4 / INT8 / INT16) --Dequant--'

Three choices keep the numbers, each answering something that ONNX Runtime does on its own
(``docs/export.md``): weights are integer constants behind DequantizeLinear, packed to INT4 where their codes
fit; the bias is an Add of its own, since a bias inside Conv or Gemm between quantized tensors is rounded to
int32; activations live in 8-bit containers behind a float Clip.
"""

import copy
import logging
import warnings
from pathlib import Path

import ml_dtypes
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor, nn

from saqcli.algorithms.exporters.facts import ModelFacts
from saqcli.algorithms.exporters.operators import TRANSLATIONS, ExportedInput, ExportedWeight
from saqcli.errors import CorruptArtifact, UnsupportedModel
from saqcli.quant.layers import quantized_layers
from saqcli.quant.quantizers import Quantizer
from saqcli.strict import parse_json

OPSET = 21  # the first with INT4 and INT16 in DequantizeLinear
IR_VERSION = 10  # of opset 21; newer ones are refused by runtimes in use
INPUT, OUTPUT = "images", "logits"
INT4_RANGE = (-8, 7)


class OnnxQdqExporter:
    """Writes a graph that ONNX Runtime and OpenVINO read."""

    suffix = ".onnx"

    def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelFacts) -> None:
        """Write ``path``.

        Args:
            model: quantized, in eval mode; left as it is.
            example: images (N, C, H, W) to trace with; the batch stays dynamic.
            path: of the file to write.
            facts: kept in the metadata of the file.

        Raises:
            UnsupportedModel: the model cannot be traced by ``torch.export``.
        """
        graph = _trace(frozen_copy(model), example)
        _split_bias(graph.graph)
        _pack_weights(graph.graph)
        _strip_defaults(graph.graph)
        for clean in (
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.ClearMetadataAndDocStringPass(),
        ):
            clean(graph)
        graph.ir_version = IR_VERSION
        graph.producer_name, graph.producer_version = "saq", facts.saq_version
        graph.metadata_props["saq.facts"] = facts.model_dump_json()
        ir.save(graph, path)
        onnx.checker.check_model(str(path), full_check=True)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the quantized model whose quantizers are the two exported operators; computes the same numbers."""
    frozen = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for layer in quantized_layers(frozen).values():
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if isinstance(weights, Quantizer):
            layer.weight_quantizer = ExportedWeight(weights, layer.effective_weight(), layer.channel_dim)
        if isinstance(inputs, Quantizer):
            layer.input_quantizer = ExportedInput(inputs)
    return frozen


def _trace(frozen: nn.Module, example: Tensor) -> ir.Model:
    batch = torch.export.Dim("batch", min=1, max=65536)
    example = example.cpu()
    if len(example) < 2:
        example = example.expand(
            2, *example.shape[1:]
        ).contiguous()  # a batch of one would be taken for a constant
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                frozen,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                external_data=False,
                custom_translation_table=TRANSLATIONS,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
    except Exception as error:  # the exporter raises whatever the model's code raised
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModel(f"the model cannot be exported to ONNX: {reason}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model


def _split_bias(graph: ir.Graph) -> None:
    """Move the bias of every Conv and Gemm over a dequantized weight into an Add behind it."""
    for node in list(graph):
        biased = node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2
        if not biased or node.inputs[2] is None or not _dequantized(node.inputs[1]):
            continue
        bias = node.inputs[2]
        if node.op_type != "Gemm":
            bias = _reshaped(graph, bias, node)
        output = node.outputs[0]
        node.resize_inputs(2)
        add = ir.node("Add", [output, bias])
        add.outputs[0].type, add.outputs[0].shape = output.type, output.shape
        total = add.outputs[0]
        output.replace_all_uses_with(total, replace_graph_outputs=True)
        add.replace_input_with(0, output)
        if output.name == OUTPUT:
            output.name, total.name = f"{OUTPUT}_without_bias", OUTPUT
        graph.insert_after(node, add)


def _dequantized(value: ir.Value | None) -> bool:
    """Whether a weight comes out of DequantizeLinear, through transposes at most."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Transpose":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _reshaped(graph: ir.Graph, bias: ir.Value, node: ir.Node) -> ir.Value:
    """The bias (C,) as a constant (1, C, 1, ...), to add to the output of a convolution."""
    if bias.const_value is None or node.inputs[1] is None or node.inputs[1].shape is None:
        raise UnsupportedModel(f"the bias of {node.name} is no constant: it cannot be exported")
    array = bias.const_value.numpy()
    spatial = len(node.inputs[1].shape) - 2
    tensor = ir.tensor(array.reshape(1, -1, *(1,) * spatial), name=f"{bias.name}_of_{node.name}")
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def _pack_weights(graph: ir.Graph) -> None:
    """Store weight codes that fit as INT4, two a byte."""
    for node in graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        codes = node.inputs[0]
        if codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        array = codes.const_value.numpy()
        if array.size and INT4_RANGE[0] <= array.min() and array.max() <= INT4_RANGE[1]:
            packed = ir.tensor(array.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=codes.name)
            codes.const_value, codes.type = packed, ir.TensorType(ir.DataType.INT4)


def _strip_defaults(graph: ir.Graph) -> None:
    """Remove attributes that only repeat the standard's defaults; some readers trip over them."""
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scalar = (
                node.inputs[1] is not None
                and node.inputs[1].shape is not None
                and not len(node.inputs[1].shape)
            )
            for name in ("output_dtype", "block_size", "saturate", *(("axis",) if scalar else ())):
                node.attributes.pop(name, None)


def read_onnx_facts(path: Path) -> ModelFacts:
    """The description that ``OnnxQdqExporter`` left in the file.

    Raises:
        CorruptArtifact: no ONNX file, or not one of saq's.
    """
    try:
        properties = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    except Exception as error:  # protobuf, onnx and the file system each have their own
        raise CorruptArtifact(
            f"{path} cannot be read as ONNX: {' '.join(str(error).split())[:200]}"
        ) from None
    if "saq.facts" not in properties:
        raise CorruptArtifact(f"{path} was not exported by saq: its preprocessing is unknown")
    return parse_json(ModelFacts, properties["saq.facts"], str(path), CorruptArtifact)
