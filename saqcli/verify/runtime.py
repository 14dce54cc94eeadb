"""Sessions of ONNX Runtime, and the number of their integer kernels.

ONNX Runtime rewrites a graph when it opens a file. It can save the rewritten graph, in which the kernels are counted.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from saqcli.errors import CorruptArtifact
from saqcli.export.model_metadata import read_onnx
from saqcli.serialization import printable
from saqcli.verify.kernels import Operator, list_operators

# Operators that multiply with weights, of the standard and of ONNX Runtime.
INTEGER_KERNELS = {
    "QLinearConv",
    "QLinearConvTranspose",
    "QLinearMatMul",
    "QGemm",
    "QAttention",
    "ConvInteger",
    "ConvIntegerToFloat",
    "MatMulInteger",
    "MatMulInteger16",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}
FLOAT_KERNELS = {
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "NhwcFusedConv",
    "MatMul",
    "FusedMatMul",
    "MatMulNBits",  # weights in few bits, products in floating point
    "Gemm",
    "FusedGemm",
    "GemmFastGelu",
    "Attention",
}


@dataclass(frozen=True)
class Kernels:
    """Number of operators of an optimized graph that multiply in integers and in floating point."""

    integer: int
    floating: int


@dataclass(frozen=True)
class OnnxFile:
    """A file that ONNX Runtime can run.

    Attributes:
        path: path of the file.
        batch: fixed batch size; None if dynamic.
        kernels: kernel counts of the optimized graph.
        operators: of the optimized graph, with their layers.
    """

    path: Path
    batch: int | None
    kernels: Kernels
    operators: tuple[Operator, ...] = ()


def open_file(path: Path) -> OnnxFile:
    """Open a file in ONNX Runtime and count its kernels.

    Raises:
        CorruptArtifact: ONNX Runtime cannot run it, or its input is not a batch of float32 images.
    """
    read_onnx(path)
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = _session(path, 1, optimized)
        batch = session.get_inputs()[0].shape[0]
        graph = onnx.load(str(optimized), load_external_data=False).graph
    operators = list_operators(onnx.load(str(path), load_external_data=False).graph, graph)
    return OnnxFile(path, batch if isinstance(batch, int) else None, count_kernels(graph), operators)


def count_kernels(graph: Any) -> Kernels:
    """Count the kernels of an ``onnx.GraphProto`` and its subgraphs."""
    names = list(_operators(graph))
    return Kernels(
        sum(name in INTEGER_KERNELS for name in names), sum(name in FLOAT_KERNELS for name in names)
    )


def _operators(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


def runner(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """A function from images to logits by ONNX Runtime on the CPU, with default optimizations.

    Args:
        path: path of a file checked by ``open_file``.
        threads: threads per operator.
    """
    return _predictor(_session(path, threads), path)


def _session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads of idle sessions would take cores from the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return open_session(path, options)


def open_session(path: Path, options: Any) -> Any:
    """ONNX Runtime's session on the CPU for a file from one batch of float images to float logits.

    Raises:
        CorruptArtifact: ONNX Runtime cannot run it, or its inputs or outputs differ.
    """
    import onnxruntime as ort

    options.log_severity_level = 4  # reasons are also in the error
    with translated_errors(path):
        session = ort.InferenceSession(  # the fallback only repeats the attempt, and prints to stdout
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise CorruptArtifact(
            f"{path} has the inputs {printable(found, 200) or 'none'} instead of one batch of float images"
        )
    if len(outputs) != 1 or outputs[0].type != "tensor(float)":
        found = ", ".join(f"{one.name} {one.type}" for one in outputs)
        raise CorruptArtifact(
            f"{path} has the outputs {printable(found, 200) or 'none'} instead of float logits"
        )
    return session


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Within the context errors of ONNX Runtime become a ``CorruptArtifact`` of one line."""
    try:
        yield
    except Exception as error:  # the exception classes of onnxruntime are not public
        reason = printable(" ".join(str(error).split()), 200)
        raise CorruptArtifact(f"ONNX Runtime cannot run {path}: {reason}") from None


def onnx_session(path: Path, *, optimized: bool, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function from images to logits by ONNX Runtime on the CPU; ``threads`` defaults to those of PyTorch."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _predictor(open_session(path, options), path)


def _predictor(session: Any, path: Path) -> Callable[[Tensor], Tensor]:
    name = session.get_inputs()[0].name

    def predict(images: Tensor) -> Tensor:
        with translated_errors(path):
            (logits,) = session.run(None, {name: images.cpu().numpy()})
        return torch.from_numpy(logits)

    return predict
