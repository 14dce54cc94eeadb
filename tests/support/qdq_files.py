"""Small Q/DQ files made node by node, and ONNX Runtime's answers for them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

OPSET = 21


class QdqFile:
    """A graph under construction: tensors are names, codes are dequantized where they are read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.shape = shape
        self.count = 0

    def constant(self, array: Any) -> str:
        self.count += 1
        name = f"c{self.count}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        self.count += 1
        name = f"t{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{self.count}", **attributes))
        return name

    def quantized(self, x: str, step: float, zero: int = 128, dtype: Any = np.uint8) -> str:
        """``x`` through QuantizeLinear and DequantizeLinear."""
        parameters = [self.constant(np.float32(step)), self.constant(np.array(zero, dtype))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, *parameters]), *parameters])

    def weight(self, codes: Any, step: Any, axis: int | None = 0, zero: int = 0) -> str:
        """Constant codes through DequantizeLinear; an axis of None for one step."""
        step = np.asarray(step, np.float32)
        zeros = np.full(step.shape, zero, codes.dtype)
        inputs = [self.constant(codes), self.constant(step), self.constant(zeros)]
        return self.node("DequantizeLinear", inputs, **({} if axis is None else {"axis": axis}))

    def save(self, path: Path, output: str, rank: int) -> Path:
        """Write the file; ``output`` of ``rank`` dimensions becomes the logits."""
        self.nodes[-1] if self.nodes else None
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *self.shape])
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, [f"d{dim}" for dim in range(rank)])
        graph = helper.make_graph(self.nodes, "graph", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        return path


def run_file(path: Path, x: Any) -> Any:
    """ONNX Runtime's answer at default optimization."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def optimized_kernels(path: Path, folder: Path) -> Counter[str]:
    """Operators of ONNX Runtime's optimized graph, without QuantizeLinear and DequantizeLinear."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    names = Counter(node.op_type for node in graph.node)
    return Counter({op: n for op, n in names.items() if op not in ("QuantizeLinear", "DequantizeLinear")})
