"""ONNX files as the benchmark runs them, and which of their layers the runtime computes in integers.

What a file says and what is run are not the same: ONNX Runtime rewrites the graph when it opens it. It can write down
what it has made of it, and there the kernels are counted.
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

# Names of operators that multiply with weights, the standard's and ONNX Runtime's own.
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
    """How many operators of an optimized graph multiply in integers, and how many in floating point."""

    integer: int
    floating: int


@dataclass(frozen=True)
class OnnxFile:
    """A file that ONNX Runtime takes.

    Attributes:
        path: of the file.
        batch: the only number of images it takes; None where any will do.
        kernels: of the optimized graph.
    """

    path: Path
    batch: int | None
    kernels: Kernels


def open_file(path: Path) -> OnnxFile:
    """Look at a file as ONNX Runtime sees it.

    Raises:
        CorruptArtifact: ONNX Runtime does not take it, or it wants anything else than images in float32.
    """
    read_onnx(path)
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = _session(path, 1, optimized)
        batch = session.get_inputs()[0].shape[0]
        kernels = count_kernels(onnx.load(str(optimized), load_external_data=False).graph)
    return OnnxFile(path, batch if isinstance(batch, int) else None, kernels)


def count_kernels(graph: Any) -> Kernels:
    """Count in an ``onnx.GraphProto`` and all graphs within it."""
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
    """Images to logits by ONNX Runtime on the CPU, at its default optimizations.

    Args:
        path: of a file that ``open_file`` took.
        threads: of every operator.
    """
    session = _session(path, threads)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        with told(path):
            (logits,) = session.run(None, {name: images.numpy()})
        return torch.from_numpy(logits)

    return run


def _session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for the next run of their own session would take the cores from the others' turns.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return open_session(path, options)


def open_session(path: Path, options: Any) -> Any:
    """ONNX Runtime's session on the CPU for a file that turns one batch of float images into float logits.

    Raises:
        CorruptArtifact: ONNX Runtime does not take it, or it is a function of something else.
    """
    import onnxruntime as ort

    options.log_severity_level = 4  # a reason comes as an error too
    with told(path):
        session = ort.InferenceSession(  # its fallback tries the same again, and prints that on stdout
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise CorruptArtifact(
            f"{path} takes {printable(found, 200) or 'nothing'}, where one batch of float images is meant"
        )
    if len(outputs) != 1 or outputs[0].type != "tensor(float)":
        found = ", ".join(f"{one.name} {one.type}" for one in outputs)
        raise CorruptArtifact(
            f"{path} gives {printable(found, 200) or 'nothing'}, where float logits are meant"
        )
    return session


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Within the context ONNX Runtime says in one line what it does not take."""
    try:
        yield
    except Exception as error:  # onnxruntime has a class for every reason, none of them public
        reason = printable(" ".join(str(error).split()), 200)
        raise CorruptArtifact(f"ONNX Runtime does not take {path}: {reason}") from None


def onnx_session(path: Path, *, optimized: bool, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Images to logits by ONNX Runtime on the CPU, with as many threads as PyTorch has unless told otherwise."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_session(path, options)
    name = session.get_inputs()[0].name

    def predict(images: Tensor) -> Tensor:
        with told(path):
            (logits,) = session.run(None, {name: images.cpu().numpy()})
        return torch.from_numpy(logits)

    return predict
