"""Times of a file's layers in ONNX Runtime, from its profile, with default optimizations.

The runtime fuses operators, reorders tensors and renames both, so its profile speaks of other nodes than the file has.
The optimized graph, which a session can save, keeps enough: a fused node has the name of one of its operators, or
writes the tensor of the last one, or is called after that tensor (``relu_3_nchwc``). From there the file itself says
which layer it is: quantizers are annotated, a multiplication has the layer of its weight, and the bias, norm and
activation that follow it are part of it. What belongs to no layer (additions of branches, pooling, conversions of the
layout) is the rest.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from saqcli.errors import CorruptArtifact
from saqcli.export.onnx_helpers import LAYER, LAYER_SEPARATOR, MULTIPLIERS
from saqcli.verify.runtime import open_session, translated_errors

REST = ""  # the name of what belongs to no layer
_FOLLOWERS = (
    "Add",
    "Sub",
    "Mul",
    "Relu",
    "Clip",
    "BatchNormalization",
)  # with one operand that is no constant
_KERNEL = "_kernel_time"  # end of a node's events in a profile


class ProfiledFile:
    """A session of a file that records the time of every operator; close it with ``layer_seconds``.

    Args:
        path: of the file.
        threads: threads per operator.
        layers: names of the network's layers.
    """

    def __init__(self, path: Path, threads: int, layers: list[str]) -> None:
        import onnxruntime as ort

        self._folder = tempfile.TemporaryDirectory(prefix="saq-")
        optimized = Path(self._folder.name) / "optimized.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        options.optimized_model_filepath = str(optimized)
        self._path, self._runs = path, 0
        self._session = open_session(path, options)
        self._input = self._session.get_inputs()[0].name
        original = onnx.load(str(path), load_external_data=False).graph
        graph = onnx.load(str(optimized), load_external_data=False).graph
        self._layer_of = layers_of_kernels(graph, original, layers)

    def run(self, images: Tensor) -> None:
        """One run, recorded."""
        with translated_errors(self._path):
            self._session.run(None, {self._input: images.numpy()})
        self._runs += 1

    def layer_seconds(self) -> list[dict[str, float]]:
        """Seconds of every layer, and of the ``REST``, in every run; the session is closed.

        Raises:
            CorruptArtifact: the profile is not one of this file.
        """
        events = json.loads(Path(self._session.end_profiling()).read_text())
        self._folder.cleanup()
        kernels = [each for each in events if each.get("cat") == "Node" and each["name"].endswith(_KERNEL)]
        each_run, left = divmod(len(kernels), max(self._runs, 1))
        if left or not kernels:
            raise CorruptArtifact(
                f"the profile of {self._path} in ONNX Runtime has not the same events in every run"
            )
        found = []
        for start in range(0, len(kernels), each_run):
            seconds: dict[str, float] = defaultdict(float)
            for event in kernels[start : start + each_run]:
                layer = self._layer_of.get(event["name"].removesuffix(_KERNEL), REST)
                seconds[layer] += 1e-6 * event["dur"]
            found.append(dict(seconds))
        return found


def layers_of_kernels(optimized: Any, original: Any, layers: list[str]) -> dict[str, str]:
    """The layer of every node of the optimized graph, by name; ``REST`` for those of no layer.

    Args:
        optimized: ``onnx.GraphProto`` as the runtime saved it.
        original: that of the file.
        layers: names of the network's layers.
    """
    of_nodes = layers_of_nodes(original, layers)
    names = {node.name: layer for node, layer in zip(original.node, of_nodes, strict=True)}
    tensors = {
        tensor: layer for node, layer in zip(original.node, of_nodes, strict=True) for tensor in node.output
    }
    found = {}
    for node in optimized.node:
        keys = (node.name, node.name.rpartition("_nchwc")[0], *node.output)
        found[node.name] = next(
            (table[key] for key in keys for table in (names, tensors) if table.get(key)), REST
        )
    return found


def layers_of_nodes(graph: Any, layers: list[str]) -> list[str]:
    """The layer of every node of a file's graph, in order."""
    producers = {tensor: index for index, node in enumerate(graph.node) for tensor in node.output}
    constants = {each.name for each in graph.initializer}
    found: list[str] = []
    for node in graph.node:  # in topological order
        annotated = next((each.value for each in node.metadata_props if each.key == LAYER), "")
        if annotated:
            found.append(annotated.split(LAYER_SEPARATOR)[0])
        elif node.op_type in MULTIPLIERS:
            found.append(_layer_of_weight(node.input[1], graph, producers, found, layers))
        elif node.op_type in _FOLLOWERS:
            moving = [name for name in node.input if name and name not in constants]
            index = producers.get(moving[0], -1) if len(moving) == 1 else -1
            found.append(found[index] if index >= 0 else REST)
        else:
            found.append(REST)
    return [name if name in layers else REST for name in found]


def _layer_of_weight(
    name: str, graph: Any, producers: Mapping[str, int], found: list[str], layers: list[str]
) -> str:
    """The layer of a weight: that of its quantizer, or, in floating point, in the name of the constant."""
    while name in producers:
        index = producers[name]
        if found[index]:
            return found[index]
        inputs = [each for each in graph.node[index].input if each]
        if not inputs:
            return REST
        name = inputs[0]
    return next((layer for layer in layers if name.startswith(f"{layer}.")), REST)
