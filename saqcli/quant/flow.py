"""Where tensors come from, while a network runs once: which layer made them, and where they meet.

Every operator of the pass is heard. A tensor is still "that layer's" after operators that pass a layer's output on,
number by number or image by image; where two such tensors are added, or joined side by side, their layers meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"}
_CONCATENATIONS = {"cat", "concat", "concatenate", "hstack"}
_WRITES = {"__setitem__", "copy_", "index_copy_", "index_put_", "scatter_", "masked_scatter_"}
_CARRIERS = set(
    "batch_norm group_norm layer_norm instance_norm relu relu_ relu6 hardtanh hardtanh_ silu gelu hardswish "
    "hardswish_ silu_ mish mish_ prelu selu celu softplus tanh hardsigmoid leaky_relu_ "
    "leaky_relu elu sigmoid clamp clamp_ clamp_min dropout contiguous identity mul mul_ __mul__ div __truediv__ "
    "float to reshape view flatten permute transpose pad".split()
)


@dataclass
class Flow:
    """What is known of a tensor.

    Attributes:
        producer: the layer whose output it is, if it still is one.
        parent: the tensor before it, on the way from that layer.
        parts: what was added or joined to make it.
        is_image: nothing but layout operators lies between the image and it.
        nearest: the last layer on the way here, whatever came after it.
        depends: on the image.
        weight_of: the layer whose weight it is, or is a part of.
        readers: how many operators read it.
    """

    producer: str | None
    parent: "Flow | None" = None
    is_image: bool = False
    nearest: str | None = None
    depends: bool = True
    weight_of: str | None = None
    parts: "tuple[Flow, ...]" = ()
    readers: int = 0

    def producers(self) -> list[str]:
        """The layers whose outputs it is made of, as long as they go nowhere else."""
        if self.readers > 1:
            return []
        if self.producer is not None:
            return [self.producer] if self.read_once() else []
        return [name for flow in self.parts or filter(None, [self.parent]) for name in flow.producers()]

    def read_once(self) -> bool:
        """No tensor between the producer and here is read twice."""
        flow: Flow | None = self
        while flow is not None:
            if flow.readers > 1:
                return False
            flow = flow.parent
        return True


class Flows:
    """The flow of every tensor so far.

    Attributes:
        meetings: tensors of layers that were added to each other or joined.
    """

    def __init__(self) -> None:
        self.meetings: list[list[Flow]] = []
        self._known: dict[int, Flow] = {}
        self._alive: list[Tensor] = []  # ids of dead tensors would be used again

    def remember(self, tensor: Tensor, flow: Flow) -> None:
        """From now on ``tensor`` has that flow."""
        self._known[id(tensor)] = flow
        self._alive.append(tensor)

    def of(self, tensor: Tensor) -> Flow | None:
        """The flow of ``tensor``; None for what the network holds: parameters and constants."""
        return self._known.get(id(tensor))

    def depends(self, *tensors: Tensor) -> bool:
        """Whether any of them depends on the image."""
        return any(flow.depends for flow in map(self.of, tensors) if flow is not None)

    def nearest(self, *tensors: Tensor) -> str | None:
        """The last layer on the way to the first of them that has one."""
        return next((flow.nearest for flow in map(self.of, tensors) if flow and flow.nearest), None)

    def weight_of(self, *tensors: Tensor) -> str | None:
        """The layer whose weight one of them is, or is a part of."""
        return next((flow.weight_of for flow in map(self.of, tensors) if flow and flow.weight_of), None)

    def read(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Operator ``name`` reads ``inputs``; in place it reads only what it adds."""
        if name in _ADDITIONS or not any(x is y for x in inputs for y in outputs):
            for flow in filter(None, map(self.of, inputs)):
                flow.readers += 1

    def passed(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """What operator ``name`` makes of its inputs' flows; it multiplies with no layer's weight."""
        flows = [flow for flow in map(self.of, inputs) if flow is not None]
        in_place = any(x is y for x in inputs for y in outputs)
        nearest, depends = self.nearest(*inputs), any(flow.depends for flow in flows)
        if name in _WRITES and inputs:
            self.remember(inputs[0], Flow(None, nearest=nearest, depends=depends))
        elif name in _ADDITIONS | _CONCATENATIONS:
            if len(flows) > 1:
                self.meetings.append(flows)
            # Adding a constant or a bias keeps the producer; a sum of two branches has several.
            kept = flows[0] if len(flows) == 1 and name in _ADDITIONS else None
            made = Flow(kept.producer if kept else None, kept, nearest=nearest, depends=depends)
            made.parts = () if kept else tuple(flows)
            made.weight_of = None if depends else self.weight_of(*inputs)
            self._all(outputs, made)
        elif not in_place:
            carried = flows[0] if len(flows) == 1 and len(outputs) == 1 and name in _CARRIERS else None
            part = None if depends else self.weight_of(*inputs)
            for output in outputs:
                self.remember(
                    output,
                    Flow(
                        carried.producer if carried else None,
                        carried,
                        is_image=carried is not None and carried.is_image,
                        nearest=nearest,
                        depends=depends,
                        weight_of=part,
                    ),
                )

    def _all(self, outputs: Sequence[Tensor], flow: Flow) -> None:
        for output in outputs:
            self.remember(output, flow)
