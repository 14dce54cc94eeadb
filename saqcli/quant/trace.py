"""One recorded forward pass that tells what a layer costs, reads, feeds and shares.

The pass runs over a wrapped, still floating-point model in eval mode. Every multiplication with a layer's
weight is recognised by the weight tensor itself, so it is seen wherever it happens: in the layer's own
forward, in a parent that takes the weight, in a layer called several times. The flow of tensors from operator
to operator gives the rest:

    norm     the first normalization a layer's output reaches through element-wise operators alone
    group    layers whose outputs meet in an addition, and go nowhere else: a projection shortcut and the last
             convolution of its branch. An identity shortcut ties nothing, since its tensor is also read by
             the branch. Layers with the same weight are a group too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.quant.layers import TRANSPOSED, QuantizedLayer, quantized_layers
from saqcli.quant.routing import WEIGHT_OPERATORS, HandedOut

_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
# Operators that pass a layer's output on, number by number or image by image: the tensor is still "that
# layer's".
_CARRIERS = set(
    "batch_norm group_norm layer_norm instance_norm relu relu_ relu6 hardtanh hardtanh_ silu gelu hardswish "
    "leaky_relu elu sigmoid clamp clamp_ clamp_min dropout contiguous identity mul mul_ __mul__ div __truediv__ "
    "float to reshape view flatten permute transpose pad".split()
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass
class LayerTrace:
    """What one traced forward pass tells about a layer, for one image.

    Attributes:
        name: qualified name in the float model.
        kind: class name of the float layer.
        macs: multiply-accumulates, summed over calls.
        calls: how often its weight is multiplied with.
        weight_count: elements of the weight.
        input_is_signed: the traced input had negative values (calibration measures it on real images).
        group: name of the first layer of its precision group, its own where it is alone.
        norm: the normalization that follows, if any.
        reads_image: nothing but layout operators lies between the image and this layer.
        channels: output channels of the weight.
        stored: its weight is its own; False where an earlier layer has the same one.
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


@dataclass
class Trace:
    """All layers in execution order, and what the pass found beside them.

    Attributes:
        layers: by name, in order of first execution.
        idle: wrapped layers that never ran (auxiliary heads); they stay in floating point.
        unquantized: modules that multiply with a weight that is no layer's (conditional convolutions), by
            name.
        routed: layers whose weight a parent multiplies with itself, by name of that parent.
        outputs: what the model returned for the traced input.
        other_bytes: of everything that is no weight of a layer: biases, norms, buffers, idle layers; 32-bit floats.
    """

    layers: dict[str, LayerTrace]
    idle: list[str]
    unquantized: dict[str, LayerTrace]
    routed: dict[str, list[str]]
    outputs: Tensor
    other_bytes: int = 0


@dataclass
class _Flow:
    """Where a tensor comes from: the layer that made it, the tensor before it, and who read it."""

    producer: str | None
    parent: "_Flow | None" = None
    is_image: bool = False
    readers: int = 0

    def read_once(self) -> bool:
        """No tensor between the producer and here is read twice."""
        flow: _Flow | None = self
        while flow is not None:
            if flow.readers > 1:
                return False
            flow = flow.parent
        return True


class _Tracer(HandedOut):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(layer): name for name, layer in quantized_layers(model).items()}
        self.layers: dict[str, LayerTrace] = {}
        self.stored: dict[int, str] = {}  # latent weights seen so far, and the first layer with each
        self.shared: list[tuple[str, str]] = []  # layers with the same weight
        self.unquantized: dict[str, LayerTrace] = {}
        self.routed: dict[str, list[str]] = {}
        self.flows: dict[int, _Flow] = {}
        self.alive: list[Tensor] = []  # ids of dead tensors would be used again
        self.meetings: list[tuple[_Flow, _Flow]] = []
        self.running: list[tuple[str, nn.Module]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and record what it means."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor):
            return output
        name = getattr(func, "__name__", "")
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        flows = [self.flows[id(value)] for value in inputs if id(value) in self.flows]
        in_place = any(value is output for value in inputs)
        if not in_place or name in _ADDITIONS:
            for flow in flows:
                flow.readers += 1
        layer = self.owner(func, args, kwargs)
        if layer is not None:
            self._multiplied(layer, inputs[0], inputs[1], output)
        elif func in WEIGHT_OPERATORS:
            self._multiplied_in_float(func, inputs[0], inputs[1], output)
        elif name in _ADDITIONS:
            if len(flows) == 2:
                self.meetings.append((flows[0], flows[1]))
            # Adding a constant or a bias keeps the producer; a sum of two branches has none.
            self._remember(output, _Flow(flows[0].producer, flows[0]) if len(flows) == 1 else _Flow(None))
        elif name in _CARRIERS and len(flows) == 1 and not in_place:
            self._remember(output, _Flow(flows[0].producer, flows[0], is_image=flows[0].is_image))
        elif not in_place:
            self._remember(output, _Flow(None))
        return output

    def _remember(self, tensor: Tensor, flow: _Flow) -> None:
        self.flows[id(tensor)] = flow
        self.alive.append(tensor)

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
        entry.input_is_signed |= bool((x < 0).any())
        flow = self.flows.get(id(x))
        entry.reads_image |= flow is not None and flow.is_image
        self._remember(output, _Flow(name))
        owner_name, owner = self.running[-1]
        if owner is not layer:
            self.routed.setdefault(owner_name, []).append(name)

    def _multiplied_in_float(self, func: Any, x: Tensor, weight: Tensor, output: Tensor) -> None:
        name, module = self.running[-1]
        entry = self.unquantized.setdefault(
            name, LayerTrace(name, type(module).__name__, weight.numel(), group=name)
        )
        entry.macs += _macs(weight, x, output, transposed="transpose" in func.__name__)
        entry.calls += 1
        self._remember(output, _Flow(None))

    def enter(self, name: str, module: nn.Module) -> None:
        """A module starts to run."""
        self.running.append((name, module))

    def leave(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module has run: if it is a norm, it follows the layer that its input comes from."""
        self.running.pop()
        if isinstance(module, _NORMS) and inputs and isinstance(inputs[0], Tensor):
            flow = self.flows.get(id(inputs[0]))
            if flow is not None and flow.producer is not None and self.layers[flow.producer].norm is None:
                self.layers[flow.producer].norm = name

    def join_groups(self) -> None:
        """Give layers whose outputs meet, and go nowhere else, one group."""
        pairs = [
            (one.producer, other.producer)
            for one, other in self.meetings
            if one.producer and other.producer and one.read_once() and other.read_once()
        ]
        for one_name, other_name in (*pairs, *self.shared):
            first, second = self.layers[one_name].group, self.layers[other_name].group
            for layer in self.layers.values():
                if layer.group == second:
                    layer.group = first


def _macs(weight: Tensor, x: Tensor, output: Tensor, *, transposed: bool) -> int:
    """Weight elements times the positions each is used at: of the output, or of the input where transposed."""
    return weight.numel() * ((x if transposed else output).numel() // weight.shape[0])


@torch.no_grad()
def trace(model: nn.Module, example: Tensor) -> Trace:
    """Run ``model`` once in eval mode and record its quantized layers.

    Args:
        model: wrapped, no quantizers installed; its mode is restored.
        example: one image, (1, C, H, W).

    Raises:
        UnsupportedModel: the forward pass fails, or its output is no (1, classes) tensor.
    """
    tracer = _Tracer(model)
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, _, name=name: tracer.enter(name, m)))
        handles.append(module.register_forward_hook(lambda m, x, _, name=name: tracer.leave(name, m, x)))
    try:
        with tracer:
            tracer._remember(example, _Flow(None, is_image=True))
            output = try_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    tracer.join_groups()
    idle = [name for name in tracer.names.values() if name not in tracer.layers]
    numbers: list[Tensor] = [p for p in model.parameters() if id(p) not in tracer.stored]
    numbers += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    other = sum(4 * tensor.numel() for tensor in numbers)
    return Trace(tracer.layers, idle, tracer.unquantized, tracer.routed, output, other)


@torch.no_grad()
def try_model(model: nn.Module, example: Tensor) -> Tensor:
    """What ``model`` returns for one image (1, C, H, W) in eval mode; its mode is restored.

    Raises:
        UnsupportedModel: the forward pass fails, or its output is no (1, classes) tensor.
    """
    training = model.training
    try:
        output = model.eval()(example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        shape = "x".join(map(str, example.shape[1:]))
        raise UnsupportedModel(f"the model does not run on an image of {shape}: {reason}") from error
    finally:
        model.train(training)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(example):
        what = f"tensor of {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModel(f"the model returns a {what} where class scores, (1, classes), are expected")
    return output
