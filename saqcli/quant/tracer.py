"""One traced forward pass: cost, precision group and norm of every layer.

The pass runs over a wrapped, still floating-point model in eval mode. Every multiplication with a layer's weight is
recognised by the weight tensor itself, wherever it happens: in the layer's forward, in a parent that reads the weight,
in a layer called several times. All operators of the pass are intercepted, and the flow of tensors between them gives
the rest. A tensor keeps its *producer*, the layer that made it, through element-wise and layout operators; where two
such tensors are added or concatenated, their layers *meet*.

    norm      the first normalization that a layer's output reaches through element-wise operators alone
    group     layers whose outputs meet in an addition or a concatenation, and are used nowhere else: a projection
              shortcut and the last convolution of its branch, the branches of an inception block. An identity shortcut
              ties nothing, since the branch also reads its tensor; nor do dense connections. Layers with the same
              weight are a group too.
    products  of two activations, as in attention, and the layer that makes their first operand
    junctions additions, concatenations, pools, gates, and which of them and of the layers read the same tensor
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.quant import products
from saqcli.quant.attention import supports_junctions, supports_products
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.junctions.kinds import Joined, dependent, kind_of, taken_apart
from saqcli.quant.junctions.tensors import JunctionTrace, Tensors
from saqcli.quant.layer import TRANSPOSED, WRAPPED, QuantizedLayer, quantized_layers
from saqcli.quant.routing import WEIGHT_OPERATORS, WeightRecorder
from saqcli.quant.wrapping import reason_for_float

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
    """The origin of a tensor.

    Attributes:
        producer: the layer whose output it is, or None.
        parent: the preceding tensor on the way from that layer.
        parts: the tensors that were added or concatenated to make it.
        is_image: only layout operators lie between the image and this tensor.
        nearest: the last layer on the way here, whatever operators followed.
        depends: whether it depends on the image.
        weight_of: the layer whose weight it is or is part of.
        readers: number of operators that read it.
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
        """The layers whose outputs it consists of, if these are used nowhere else."""
        if self.readers > 1:
            return []
        if self.producer is not None:
            return [self.producer] if self.read_once() else []
        return [name for flow in self.parts or filter(None, [self.parent]) for name in flow.producers()]

    def read_once(self) -> bool:
        """Whether no tensor from the producer to this one is read twice."""
        flow: Flow | None = self
        while flow is not None:
            if flow.readers > 1:
                return False
            flow = flow.parent
        return True


class Flows:
    """The flow of every tensor so far.

    Attributes:
        meetings: tensors that were added to each other or concatenated.
    """

    def __init__(self) -> None:
        self.meetings: list[list[Flow]] = []
        self._known: dict[int, Flow] = {}
        self._alive: list[Tensor] = []  # ids of dead tensors would be reused

    def set(self, tensor: Tensor, flow: Flow) -> None:
        """Set the flow of ``tensor``."""
        self._known[id(tensor)] = flow
        self._alive.append(tensor)

    def get(self, tensor: Tensor) -> Flow | None:
        """The flow of ``tensor``; None for parameters and constants."""
        return self._known.get(id(tensor))

    def depends(self, *tensors: Tensor) -> bool:
        """Whether any of them depends on the image."""
        return any(flow.depends for flow in map(self.get, tensors) if flow is not None)

    def nearest(self, *tensors: Tensor) -> str | None:
        """The last layer on the way to the first tensor that has one."""
        return next((flow.nearest for flow in map(self.get, tensors) if flow and flow.nearest), None)

    def weight_of(self, *tensors: Tensor) -> str | None:
        """The layer whose weight one of them is or is part of."""
        return next((flow.weight_of for flow in map(self.get, tensors) if flow and flow.weight_of), None)

    def count_readers(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Count operator ``name`` as reader of ``inputs``; in-place operators read only what they add."""
        if name in _ADDITIONS or not any(x is y for x in inputs for y in outputs):
            for flow in filter(None, map(self.get, inputs)):
                flow.readers += 1

    def propagate(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Set the flows of the outputs of operator ``name``, which multiplies with no layer's weight."""
        flows = [flow for flow in map(self.get, inputs) if flow is not None]
        in_place = any(x is y for x in inputs for y in outputs)
        nearest, depends = self.nearest(*inputs), any(flow.depends for flow in flows)
        if name in _WRITES and inputs:
            self.set(inputs[0], Flow(None, nearest=nearest, depends=depends))
        elif name in _ADDITIONS | _CONCATENATIONS:
            if len(flows) > 1:
                self.meetings.append(flows)
            # Adding a constant or a bias keeps the producer; a sum of two branches has several.
            kept = flows[0] if len(flows) == 1 and name in _ADDITIONS else None
            made = Flow(kept.producer if kept else None, kept, nearest=nearest, depends=depends)
            made.parts = () if kept else tuple(flows)
            made.weight_of = None if depends else self.weight_of(*inputs)
            for output in outputs:
                self.set(output, made)
        elif not in_place:
            carried = flows[0] if len(flows) == 1 and len(outputs) == 1 and name in _CARRIERS else None
            part = None if depends else self.weight_of(*inputs)
            for output in outputs:
                self.set(
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


@dataclass
class LayerTrace:
    """A layer in the traced forward pass, for one image.

    Attributes:
        name: qualified name in the float model.
        kind: class name of the float layer.
        macs: multiply-accumulates, summed over calls.
        calls: number of multiplications with its weight.
        weight_count: elements of the weight.
        input_is_signed: the traced input has negative values (calibration measures it on real images).
        group: name of the first layer of its precision group.
        norm: name of the normalization that follows, or None.
        reads_image: only layout operators lie between the image and this layer.
        channels: output channels of the weight.
        stored: False if an earlier layer has the same weight.
        reason: why an unquantized module stays in floating point.
    """

    name: str
    kind: str
    weight_count: int
    macs: int = 0
    calls: int = 0
    input_is_signed: bool = False
    group: str = ""
    norm: str | None = None
    reads_image: bool = False
    channels: int = 0
    stored: bool = True
    reason: str = ""


@dataclass
class ProductTrace:
    """A product of two activations.

    Attributes:
        owner: name of the module whose forward multiplies.
        index: index of the product in one forward of its owner.
        macs: multiply-accumulates, summed over calls.
        follows: the layer that computes its first operand, whose input bits it has.
    """

    owner: str
    index: int
    macs: int = 0
    follows: str | None = None

    @property
    def name(self) -> str:
        """Name of the module that quantizes it."""
        return f"{self.owner}.products.{self.index}".lstrip(".")


@dataclass
class Trace:
    """The result of a traced pass: all layers in execution order, products and unquantized modules.

    Attributes:
        layers: by name, in order of first execution.
        idle: wrapped layers that never ran (auxiliary heads); they stay in floating point.
        unquantized: modules that multiply with the weight of no quantized layer (conditional convolutions), by name.
        products: of two activations, in order of first execution.
        junctions: of all kinds, in order of first execution.
        reads: tensors, by number, that each layer and each operand of a junction reads, in order of execution.
        routed: layers whose weight a parent multiplies with, by name of that parent.
        outputs: the model's output for the traced input.
        inputs: shapes of the input tensors, for one sample.
        returned: the last layer on the way to each returned tensor.
        other_bytes: bytes of everything except weights of layers: biases, norms, buffers, idle layers; 32-bit floats.
    """

    layers: dict[str, LayerTrace]
    idle: list[str]
    unquantized: dict[str, LayerTrace]
    routed: dict[str, list[str]]
    outputs: Any
    inputs: list[tuple[int, ...]]
    returned: list[str]
    other_bytes: int = 0
    products: list[ProductTrace] = field(default_factory=list)
    junctions: list[JunctionTrace] = field(default_factory=list)
    reads: dict[str, set[int]] = field(default_factory=dict)


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
COMPUTED_WEIGHT = "multiplies with a weight that depends on the image"
OWN_WEIGHT = "multiplies with a parameter that is no layer's weight"
RECURRENT = "is recurrent: one fused operator"
FUNCTIONAL = "multiplies with the weight of {} in a way that cannot be followed"


@dataclass
class _Running:
    """A module in execution.

    Attributes:
        name: its name.
        module: itself.
        products: computed since it started, submodules included.
        joins: calls of operators that have a kind, without submodules.
    """

    name: str
    module: nn.Module
    products: int = 0
    joins: int = 0


class _Tracer(WeightRecorder):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(layer): name for name, layer in quantized_layers(model).items()}
        self.layers: dict[str, LayerTrace] = {}
        self.stored: dict[int, str] = {}  # the first layer with each latent weight, by id
        self.shared: list[tuple[str, str]] = []  # layers with the same weight
        self.unquantized: dict[str, LayerTrace] = {}
        self.routed: dict[str, list[str]] = {}
        self.products: dict[tuple[str, int], ProductTrace] = {}
        self.junctions: dict[tuple[str, int], JunctionTrace | None] = {}  # None if its calls differ
        self.reads: dict[str, set[int]] = {}
        self.tensors = Tensors()
        self.flows = Flows()
        self.running: list[_Running] = []

    def record(self, weight: Tensor, layer: QuantizedLayer) -> None:
        """Record a weight that is read, and start its flow."""
        super().record(weight, layer)
        if self.flows.get(weight) is None:
            self.flows.set(weight, Flow(None, depends=False, weight_of=self.names[id(layer)]))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and record its multiplications and flows."""
        kwargs = kwargs or {}
        kind = kind_of(func)
        joined = None if kind is None else taken_apart(func, args, kwargs)
        numbers = [] if joined is None else self._tensors_of(joined)  # before a write
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
        self.tensors.follow(func, args, kwargs, inputs, outputs)
        if kind is not None and joined is not None:
            self._joined(kind, joined, numbers, output)
        if not outputs and name != "__setitem__":
            return output
        self.flows.count_readers(name, inputs, outputs)
        layer = self.owner(func, args, kwargs)
        if func in WEIGHT_OPERATORS:
            (x, weight, *_), _ = products.operands_first(args, kwargs, ("weight",))
            if layer is not None:
                self._multiplied(layer, x, weight, output)
            else:
                self._multiplied_in_float(func, x, weight, output)
        else:
            if func in products.OPERATORS | products.ADD_OPERATORS:
                self._multiplied_activations(products.pairs(func, args, kwargs, output))
            self.flows.propagate(name, inputs, outputs)
        return output

    def _tensors_of(self, joined: Joined) -> list[int]:
        return [self.tensors.number(x) if isinstance(x, Tensor) else 0 for x in joined.operands]

    def _joined(self, kind: str, joined: Joined, numbers: list[int], output: Any) -> None:
        """Record a call of an operator that has a kind, if modules can be redirected through a junction."""
        running = self.running[-1]
        if not supports_junctions(running.module):
            return
        key = running.name, running.joins
        running.joins += 1
        positions = dependent(kind, joined, output, self.flows.depends)
        entry = self.junctions.setdefault(key, JunctionTrace(*key, kind, positions))
        if entry is None or not positions or (entry.kind, entry.positions) != (kind, positions):
            self.junctions[key] = None
            return
        entry.numbers += output.numel()
        entry.results.add(self.tensors.number(output))
        for name, position in zip(entry.operands, positions, strict=True):
            self.reads.setdefault(name, set()).add(numbers[position])

    def _multiplied(self, layer: QuantizedLayer, x: Tensor, weight: Tensor, output: Tensor) -> None:
        name = self.names[id(layer)]
        entry = self.layers.get(name)
        if entry is None:
            latent = layer.latent_weight()
            entry = LayerTrace(name, layer.float_class.__name__, latent.numel(), group=name)
            entry.channels, entry.stored = latent.shape[layer.channel_dim], id(latent) not in self.stored
            first = self.stored.setdefault(id(latent), name)
            if not entry.stored:
                self.shared.append((first, name))
            self.layers[name] = entry
        entry.macs += _macs(weight, x, output, transposed=issubclass(layer.float_class, TRANSPOSED))
        entry.calls += 1
        self.reads.setdefault(name, set()).add(self.tensors.number(x))
        entry.input_is_signed |= bool((x < 0).any())
        flow = self.flows.get(x)
        entry.reads_image |= flow is not None and flow.is_image
        self.flows.set(output, Flow(name, nearest=name))
        if self.running[-1].module is not layer:
            self.routed.setdefault(self.running[-1].name, []).append(name)

    def _multiplied_in_float(self, func: Any, x: Tensor, weight: Tensor, output: Tensor) -> None:
        source = self.flows.weight_of(weight)
        if source is not None:
            reason = FUNCTIONAL.format(source)
        else:
            reason = COMPUTED_WEIGHT if self.flows.depends(weight) else OWN_WEIGHT
            module = self.running[-1].module
            if isinstance(module, WRAPPED):  # but was not wrapped
                reason = reason_for_float(module) or reason
        self._add_unquantized(
            weight.numel(), _macs(weight, x, output, transposed="transpose" in func.__name__), reason
        )
        self.flows.set(output, Flow(None, nearest=self.flows.nearest(x)))

    def _add_unquantized(self, weight_count: int, macs: int, reason: str) -> None:
        """Record a multiplication of the running module in floating point."""
        running = self.running[-1]
        kind = type(running.module)
        kind = getattr(kind, "float_class", kind)
        entry = self.unquantized.setdefault(
            running.name,
            LayerTrace(running.name, kind.__name__, weight_count, group=running.name, reason=reason),
        )
        entry.macs += macs
        entry.calls += 1
        if reason == COMPUTED_WEIGHT:  # mixing the weight costs less than multiplying with it
            entry.reason = reason

    def _multiplied_activations(self, found: Sequence[products.Pair]) -> None:
        running = self.running[-1]
        for pair in found:
            index = running.products
            for each in self.running:
                each.products += 1
            source = self.flows.weight_of(*pair.left, pair.right)
            if source is not None:
                self._add_unquantized(0, pair.macs, FUNCTIONAL.format(source))
            elif self.flows.depends(*pair.left) and self.flows.depends(pair.right):
                key = running.name, index
                entry = self.products.setdefault(key, ProductTrace(*key))
                entry.macs += pair.macs
                if supports_products(running.module):
                    entry.follows = entry.follows or self.flows.nearest(*pair.left, pair.right)
            elif self.flows.depends(*pair.left, pair.right):
                self._add_unquantized(0, pair.macs, OWN_WEIGHT)

    def enter(self, name: str, module: nn.Module) -> None:
        """Record the start of a module's forward."""
        self.running.append(_Running(name, module))

    def leave(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Record the end of a module's forward; a norm is assigned to the producer of its input."""
        if isinstance(module, nn.RNNBase):
            self._add_unquantized(*_recurrent(module, inputs[0]), RECURRENT)
        self.running.pop()
        if isinstance(module, _NORMS) and inputs and isinstance(inputs[0], Tensor):
            flow = self.flows.get(inputs[0])
            if flow is not None and flow.producer is not None and self.layers[flow.producer].norm is None:
                self.layers[flow.producer].norm = name

    def join_groups(self) -> None:
        """Merge the groups of layers whose outputs meet and are used nowhere else."""
        pairs = list(self.shared)
        for meeting in self.flows.meetings:
            meet = [name for flow in meeting for name in flow.producers()]
            pairs += [(meet[0], other) for other in meet[1:]]
        for one_name, other_name in pairs:
            first, second = self.layers[one_name].group, self.layers[other_name].group
            for layer in self.layers.values():
                if layer.group == second:
                    layer.group = first


def _macs(weight: Tensor, x: Tensor, output: Tensor, *, transposed: bool) -> int:
    """Weight elements times positions: of the output, or of the input if transposed."""
    return weight.numel() * ((x if transposed else output).numel() // weight.shape[0])


def _recurrent(module: nn.RNNBase, x: Tensor) -> tuple[int, int]:
    """Number of weight elements of a recurrent layer, and its multiply-accumulates for a sequence ``x``."""
    count = sum(
        parameter.numel() for name, parameter in module.named_parameters() if name.startswith("weight")
    )
    return count, count * (x.numel() // x.shape[-1])


@torch.no_grad()
def trace(model: nn.Module, example: Tensor | Call) -> Trace:
    """Run ``model`` once in eval mode and record its quantized layers.

    Args:
        model: wrapped, no quantizers installed; its mode is restored.
        example: one image, (1, C, H, W), or another call with one sample.

    Raises:
        UnsupportedModel: the forward pass fails, or uses no convolution and no linear layer.
    """
    example = Call.of(example)
    tracer = _Tracer(model)
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, _, name=name: tracer.enter(name, m)))
        handles.append(module.register_forward_hook(lambda m, x, _, name=name: tracer.leave(name, m, x)))
    try:
        with tracer:
            for tensor in example.tensors:
                tracer.flows.set(tensor, Flow(None, is_image=True))
            output = try_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    tracer.join_groups()
    if not tracer.layers:
        raise UnsupportedModel(
            "none of the model's convolutions and linear layers runs: there is nothing to quantize"
        )
    idle = [name for name in tracer.names.values() if name not in tracer.layers]
    numbers: list[Tensor] = [p for p in model.parameters() if id(p) not in tracer.stored]
    numbers += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    other = sum(4 * tensor.numel() for tensor in numbers)
    found = list(tracer.products.values())
    ends = [flow for tensor in tensors_in(output) if (flow := tracer.flows.get(tensor)) is not None]
    returned = list(dict.fromkeys(flow.nearest for flow in ends if flow.nearest is not None))
    shapes = [tuple(tensor.shape[1:]) for tensor in example.tensors]
    return Trace(
        tracer.layers,
        idle,
        tracer.unquantized,
        tracer.routed,
        output,
        shapes,
        returned,
        other,
        found,
        [junction for junction in tracer.junctions.values() if junction is not None],
        tracer.reads,
    )


@torch.no_grad()
def try_model(model: nn.Module, example: Tensor | Call) -> Any:
    """The output of ``model`` for one image (1, C, H, W), or another call, in eval mode; its mode is restored.

    Raises:
        UnsupportedModel: the forward pass fails.
    """
    training, example = model.training, Call.of(example)
    try:
        output = example.run(model.eval())
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(f"the model does not run on {example.text}: {reason}") from error
    finally:
        model.train(training)
    return output
