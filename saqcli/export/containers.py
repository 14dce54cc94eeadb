"""Size of the weights in an ONNX file, compared with their true bits.

ONNX has containers of 4, 8, 16 or 32 bits:

    2 to 4 bits, codes in -8 ... 7       INT4
    up to 8 bits, codes in -128 ... 127  INT8     odd codes of 4 bits reach 15
    odd codes of 8 bits                  INT16    they reach 255

All figures are read from the graph and therefore hold for every style and grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from saqcli.export import onnx_helpers
from saqcli.units import format_quantity

WIDTHS = (4, 8, 16, 32)  # of containers, in bits
EXPLAINED_RATIO = 1.25  # of a file's size to that at the true bits, above which the size is explained
LEAST_SHARE = 0.05  # of a file's size, for a cause or a remedy to be named
_NAMED = 2  # most kinds of containers that a message names


@dataclass(frozen=True)
class StoredWeight:
    """The codes of a layer, or some of them, as stored in a file.

    Attributes:
        layer: name of the layer.
        count: number of codes.
        bits: true bits of a code.
        container: name of the type.
        width: bits of the container per code.
        reach: largest magnitude of a code; 0 if values are stored instead.
    """

    layer: str
    count: int
    bits: int
    container: str
    width: int
    reach: int

    @property
    def least(self) -> int:
        """Container bits per code on a grid with zero, whose codes of b bits fit b bits."""
        return min(width for width in WIDTHS if width >= self.bits)


@dataclass(frozen=True)
class WeightStorage:
    """The weights of quantized layers in a file.

    Attributes:
        file_bytes: size of the whole file.
        weights: stored weights in the order of the graph.
    """

    file_bytes: int
    weights: tuple[StoredWeight, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the codes in their containers."""
        return sum(each.count * each.width for each in self.weights) // 8

    @property
    def true_bytes(self) -> int:
        """Bytes of the codes at their true bits."""
        return sum(each.count * each.bits for each in self.weights) // 8

    @property
    def with_zero_grid(self) -> int:
        """Approximate size of the file if all codes fitted their true bits, as on a grid with zero."""
        saved = sum(each.count * (each.width - each.least) for each in self.weights if each.reach)
        return self.file_bytes - saved // 8

    def explain_size(self, true_size: int, style: str) -> str | None:
        """Why the file is much larger than the model at its true bits, and what to do; None if it is not.

        Args:
            true_size: bytes of the model, each weight at its bits.
            style: style of the file.
        """
        if self.file_bytes <= EXPLAINED_RATIO * true_size:
            return None
        wide = [each for each in self.weights if each.width > each.bits]
        wider = self.weight_bytes - self.true_bytes
        rest = self.file_bytes - true_size - wider
        reasons = []
        if wider >= LEAST_SHARE * self.file_bytes:
            reasons.append(f"{format_quantity(wider, 'B')} for wider containers ({_containers(wide)})")
        if rest >= LEAST_SHARE * self.file_bytes:
            reasons.append(f"{format_quantity(rest, 'B')} for graph, names and metadata")
        text = (
            f"the ONNX file has {format_quantity(self.file_bytes, 'B')} where the true bits need "
            f"{format_quantity(true_size, 'B')}: {' and '.join(reasons)}"
        )
        if style in FIXED:
            text += f". Style {style} {FIXED[style]}"
            narrower = any(each.width > 8 or (each.width == 8 and each.reach < 8) for each in wide)
            return f"{text}: style qdq has smaller ones" if narrower else text
        if self.file_bytes - self.with_zero_grid >= LEAST_SHARE * self.file_bytes:
            smaller = format_quantity(self.with_zero_grid, "B")
            text += (
                f". Quantized with `quantization.weight_grid=zero` it can shrink to about {smaller}: compare the "
                "accuracy"
            )
        return text


FIXED = {"trt": "has INT8 containers only", "qonnx": "has float32 constants only"}  # whatever the bits


def _containers(wide: list[StoredWeight]) -> str:
    """As in ``4-bit weights of 18 layers in INT8, their codes reach 15``, largest excess first."""
    kinds: dict[tuple[int, str], list[StoredWeight]] = {}
    for each in wide:
        kinds.setdefault((each.bits, each.container), []).append(each)

    def excess(members: list[StoredWeight]) -> int:
        return sum(each.count * (each.width - each.bits) for each in members)

    texts = []
    for members in sorted(kinds.values(), key=excess, reverse=True)[:_NAMED]:
        bits, layers = members[0].bits, len({each.layer for each in members})
        reach = max(each.reach for each in members)
        why = f", their codes reach {reach}" if reach >= 2 ** (bits - 1) else ""
        texts.append(
            f"{bits}-bit weights of {layers} layer{'s' * (layers != 1)} in {members[0].container}{why}"
        )
    return "; ".join(texts)


def weight_storage(path: Path) -> WeightStorage:
    """The stored weights of the ONNX file at ``path``, written by one of ``EXPORTERS``."""
    graph = onnx.load(str(path)).graph
    constants = {each.name: each for each in graph.initializer}
    return WeightStorage(path.stat().st_size, tuple(_stored(graph, constants)))


def _zeros(node: Any, constants: dict[str, Any]) -> Any:
    """The zero points of a DequantizeLinear, a scalar or one per slice along its axis, shaped like its codes."""
    if len(node.input) < 3 or node.input[2] not in constants:
        return 0
    zeros = onnx.numpy_helper.to_array(constants[node.input[2]]).astype(int)
    dims = len(constants[node.input[0]].dims)
    axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
    return zeros.reshape([-1 if dim == axis % dims else 1 for dim in range(dims)]) if zeros.ndim else zeros


def _stored(graph: Any, constants: dict[str, Any]) -> Iterator[StoredWeight]:
    seen: set[str] = set()
    for node in graph.node:
        annotations = {entry.key: entry.value for entry in node.metadata_props}
        name = node.input[0] if node.input else ""
        if annotations.get(onnx_helpers.OPERAND) != "weight" or name not in constants or name in seen:
            continue
        seen.add(name)
        kind = onnx.TensorProto.DataType.Name(constants[name].data_type)
        codes = onnx.numpy_helper.to_array(constants[name])
        reach = (
            0 if kind == "FLOAT" else int(np.abs(codes.astype(int) - _zeros(node, constants)).max(initial=0))
        )
        width = 4 if kind.endswith("INT4") else 8 * codes.itemsize  # NumPy takes a byte for four bits
        yield StoredWeight(
            annotations[onnx_helpers.LAYER],
            codes.size,
            int(annotations[onnx_helpers.BITS]),
            kind,
            width,
            reach,
        )
