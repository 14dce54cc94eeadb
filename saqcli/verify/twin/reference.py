"""Operators by ONNX's reference implementation, for those that have no form of their own here."""

from typing import Any

import onnx
from onnx.reference import ReferenceEvaluator


def reference(proto: Any, values: list[Any], opset: int) -> list[Any]:
    """All outputs of one node.

    Args:
        proto: the ``onnx.NodeProto``.
        values: its inputs; None for an absent one.
        opset: version of the standard operators.
    """
    names = [f"i{index}" if value is not None else "" for index, value in enumerate(values)]
    node = onnx.NodeProto()
    node.CopyFrom(proto)
    del node.input[:]
    node.input.extend(names)
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape)
        )
        for name, value in zip(names, values, strict=True)
        if name
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    graph = onnx.helper.make_graph([node], "node", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    feed = {name: value for name, value in zip(names, values, strict=True) if name}
    return list(ReferenceEvaluator(model).run(None, feed))
