"""Checks that saq computes on a device what it computes on the CPU; ``gpu.py`` and the tests run the same ones.

A check is a function of a ``Place``: it returns figures, and raises ``CheckFailed`` where the device falls short. It
needs neither data nor network. The tests run the checks on the CPU, on CUDA where there is one, and on the stand-in of
``tests/support/standin.py``.
"""

import copy
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli as saq
from saqcli import distributed
from saqcli.analysis import INSTRUMENTS
from saqcli.config import TrainingSection
from saqcli.export import STYLES
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import QUANTIZERS, Quantizer
from saqcli.random_state import deterministic
from saqcli.searchers import SEARCHERS
from saqcli.training.execution import Execution
from saqcli.training.minimizers import MINIMIZERS, Minimizer
from saqcli.training.options import accepted
from saqcli.training.step import Recovery
from saqcli.training.trainer import Trainer

CHANNELS, SIDE, CLASSES = 3, 16, 10
BITS = (2, 8)  # on two different grids
Batch = tuple[Tensor, Tensor]
Figures = dict[str, Any]
# Options with which a search takes seconds.
FAST: dict[str, dict[str, Any]] = {
    "samq": {"epochs": 1},
    "asga": {"epochs": 1},
    "random": {"draws": 3},
    "hawq": {"samples": 2},
}


class CheckFailed(AssertionError):
    """The device computes something else than it should."""


class Place(NamedTuple):
    """Where a check runs.

    Attributes:
        device: to check; a GPU with its index.
        quick: sizes for a CPU.
    """

    device: torch.device
    quick: bool = True

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of NVIDIA or AMD."""
        return self.device.type == "cuda"


CPU = Place(torch.device("cpu"))
Check = Callable[[Place], Figures]


def require(holds: bool, what: str) -> None:
    """Raise ``CheckFailed(what)`` unless it ``holds``."""
    if not holds:
        raise CheckFailed(what)


# The network and its images.


class Block(nn.Module):
    """A depthwise and a pointwise convolution around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return torch.relu(x + self.pointwise(torch.relu(self.norm(self.depthwise(x)))))


def network(width: int = 8) -> nn.Module:
    """A small network with every kind of layer that image networks have, in eval mode; batch norms have seen images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        )
        with torch.no_grad():
            for seed in range(3):
                net.train()(batch(32, seed)[0])
    return net.eval()


class Attention(nn.Module):
    """Patches as tokens, self-attention, the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, classes)."""
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        mixed: Tensor = self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))
        return mixed


def attention() -> nn.Module:
    """A transformer of one layer, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention().eval()


def batch(count: int = 32, seed: int = 0) -> Batch:
    """Images (count, C, H, W) with a pattern for each class, and their labels, on the CPU."""
    patterns = torch.randn(CLASSES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator), labels


def batches(place: Place, number: int = 3, count: int = 32) -> list[Batch]:
    """Some batches on the device."""
    return [
        (x.to(place.device), y.to(place.device)) for x, y in (batch(count, seed) for seed in range(number))
    ]


def quantized(bits: str = "w4a4", make: Callable[[], nn.Module] = network, **options: Any) -> nn.Module:
    """The network quantized on the CPU, in training mode."""
    model = saq.quantize_model(make(), bits, calibration=[batch(64, 7)[0]], **options)
    return model.train()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum and weight decay."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)


def minimizer_of(name: str, model: nn.Module, **options: Any) -> Minimizer:
    """The minimizer ``name`` with those of the options that it takes."""
    make = MINIMIZERS[name]
    taken = {key: value for key, value in options.items() if key in accepted(make)[0]}
    return make(model, sgd(model), **taken)


def loss_of(model: nn.Module, data: Batch) -> Callable[[], Tensor]:
    """The closure of a step."""
    return lambda: F.cross_entropy(model(data[0]), data[1])


# Comparison.


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest relative difference, tensor by tensor, between two changes since ``start``."""
    largest = 0.0
    for name, before in start.items():
        if before.is_floating_point():
            change = (theirs[name] - before).double().norm().item()
            apart = (ours[name] - theirs[name]).double().norm().item()
            largest = max(largest, apart / max(change, 1e-12) if apart else 0.0)
    return largest


def unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in a bit."""
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the context neither convolutions nor products of matrices use TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# Quantizers and minimizers.


def _operands(name: str) -> Iterator[tuple[str, type[Quantizer], Callable[[int], Any], tuple[int, ...]]]:
    """Name, class, grid by bit-width and shape of a level, of all operands that the quantizer has."""
    entry = QUANTIZERS[name]
    for kind in filter(None, (entry.weight, entry.normalized)):
        for grid in kind.weight_grids:
            for shape in [(24, 1)] * ("channel" in kind.granularities) + [()] * (
                "tensor" in kind.granularities
            ):
                label = f"{kind.__name__} {grid} {'channel' if shape else 'tensor'}"
                yield label, kind, partial(kind.weight_grid, kind=grid), shape
    if entry.activation is not None:
        for signed in (False, True):
            label = f"{entry.activation.__name__} {'signed' if signed else 'unsigned'}"
            yield label, entry.activation, partial(entry.activation.activation_grid, signed=signed), ()


def _passed(quantizer: Quantizer, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Outputs, codes, the gradient of ``x``, and those of the parameters."""
    leaf = x.clone().requires_grad_()
    out = quantizer(leaf)
    out.backward(grad)
    assert leaf.grad is not None
    found = {"output": out, "codes": quantizer.codes(x), "x": leaf.grad}
    return on_cpu(found | {n: p.grad for n, p in quantizer.named_parameters() if p.grad is not None})


def check_quantizer(name: str, place: Place) -> Figures:
    """Every class of a quantizer: codes, gradients and fitted levels are those of the CPU.

    Division is correctly rounded on both, so that codes are equal but for the transcendental functions of some; sums,
    such as the gradients of levels, differ by rounding.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(24, 16, 3, generator=generator).flatten(1) for _ in range(2))
    most, gradients, errors, count = 0.0, 0.0, 0.0, 0
    for label, kind, grid, shape in _operands(name):
        given = x.abs() if label.endswith("unsigned") else x
        for bits in BITS:
            ours = kind({bits: grid(bits)}, shape)
            ours.fit(given)
            theirs = copy.deepcopy(ours).to(place.device)
            here, there = (
                _passed(ours, given, grad),
                _passed(theirs, given.to(place.device), grad.to(place.device)),
            )
            other = (here["codes"] != there["codes"]).float().mean().item()
            require(other <= 1e-3, f"{label} at {bits} bits: {100 * other:.2f} % of the codes differ")
            same = here["codes"] == there["codes"]
            apart = (here["output"] - there["output"])[same].abs().max().item()
            scale = here["output"].abs().max().item()
            require(apart <= 1e-5 * scale, f"{label} at {bits} bits: outputs differ by {apart:g}")
            for key in here.keys() - {"output", "codes"}:
                norm = here[key].norm().item()
                off = (here[key] - there[key]).norm().item() / max(norm, 1e-12)
                require(off <= 1e-2, f"{label} at {bits} bits: the gradient of {key} differs by {off:g}")
                gradients = max(gradients, off)
            fitted = kind({bits: grid(bits)}, shape).to(place.device)
            fitted.fit(given.to(place.device))
            with torch.no_grad():
                found, wanted = ((q(v) - v).square().sum().item() for q, v in (
                    (fitted, given.to(place.device)), (ours, given)))  # fmt: skip
            errors = max(errors, abs(found / wanted - 1))
            require(errors <= 1e-2, f"{label} at {bits} bits: the fit has {found / wanted:g} of the error")
            most, count = max(most, other), count + 1
    return {"cases": count, "codes_differing": most, "gradients_apart": gradients, "fit_errors_apart": errors}


def _steps(name: str, model: nn.Module, data: list[Batch], dtype: torch.dtype, **options: Any) -> Figures:
    model.to(dtype)
    minimizer = minimizer_of(name, model, rho=0.5, **options)
    losses = [minimizer.step(loss_of(model, (x.to(dtype), y))).item() for x, y in data]
    return {"losses": losses, "state": on_cpu(model.state_dict())}


def check_minimizer(name: str, place: Place) -> Figures:
    """Three steps give the weights of the CPU: in float64 to 1e-6; in float32 the difference is reported.

    In float32 a value at the edge between two codes may fall on the other side, which is a difference of a whole step.
    """
    figures: Figures = {}
    for dtype, most in ((torch.float64, 1e-6), (torch.float32, math.inf)):
        for options in ({}, {"interval": 2, "reuse": 0.5}):
            ours, theirs = quantized(), quantized().to(place.device)
            start = on_cpu(ours.to(dtype).state_dict())
            with full_float32():
                here = _steps(name, ours, batches(CPU), dtype, **options)
                there = _steps(name, theirs, batches(place), dtype, **options)
            apart = difference(there["state"], here["state"], start)
            require(apart <= most, f"in {dtype} the updates differ by {apart:g}")
            require(all(map(math.isfinite, there["losses"])), f"a loss is not finite: {there['losses']}")
            key = str(dtype).removeprefix("torch.") + (" interval" if options else "")
            figures[key] = apart
            if name == "qat":
                break
    return figures


# Training.


class Stop(Exception):
    """Ends a training run between two steps."""


class StopAt:
    """A training run that stops at a given step, and keeps the losses."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.steps = step, 0
        self.losses: list[float] = []

    def offer(self, state: Callable[[], dict[str, Any]], **when: bool) -> None:
        """Stop at the step."""
        self.steps += 1
        if self.steps == self.step:
            raise Stop

    def log(self, **values: Any) -> None:
        """Keep the loss of training."""
        if values["phase"] == "train":
            self.losses.append(values["loss"])

    def check_signal(self) -> None:
        """Signals are raised as usual."""


def trainer(place: Place, run: Any = None, number: int = 4, count: int = 32, **settings: Any) -> Trainer:
    """A trainer with all that has state: average, teacher, interval and reuse of the ascent, best epoch."""
    chosen: dict[str, Any] = {
        "epochs": 2,
        "lr": 0.02,
        "ema_decay": 0.9,
        "sam_interval": 2,
        "sam_reuse": 0.5,
        "clip_grad": 5.0,
        "label_smoothing": 0.1,
    } | settings
    model = quantized().to(place.device)
    return Trainer(
        model,
        batches(CPU, number, count),  # as loaders give them
        TrainingSection(**chosen),
        num_classes=CLASSES,
        image_size=SIDE,
        validation=batches(CPU, 1),
        teacher=network().to(place.device),
        run=StopAt() if run is None else run,
    )


def trained(place: Place, **settings: Any) -> dict[str, Tensor]:
    """The model after a whole training."""
    torch.manual_seed(0)
    made = trainer(place, **settings)
    made.fit()
    return on_cpu(made.model.state_dict())


def check_trainer(place: Place) -> Figures:
    """Training with average, distillation and evaluation: the loss falls; results of the CPU are near."""
    run = StopAt()
    torch.manual_seed(0)
    made = trainer(place, run, number=8, epochs=2)
    made.fit()
    require(made.last is not None and made.best is not None, "nothing was evaluated")
    require(run.losses[-1] < run.losses[0], f"the loss does not fall: {run.losses}")
    return {"losses": run.losses, "top1": made.last.top1 if made.last else math.nan}


def check_determinism(place: Place) -> Figures:
    """Two trainings are equal bit for bit with deterministic kernels; without, it is reported."""
    figures: Figures = {}
    for name, context in (("deterministic", deterministic), ("default", nullcontext)):
        with context():
            apart = unequal(trained(place), trained(place))
        figures[f"{name} unequal tensors"] = len(apart)
        require(
            name == "default" or not apart, f"two runs differ in {len(apart)} tensors, such as {apart[:1]}"
        )
    return figures


def check_resume(place: Place, **settings: Any) -> Figures:
    """A training that stops within an epoch and resumes from a file equals one that does not, bit for bit."""
    with deterministic(), tempfile.TemporaryDirectory() as folder:
        whole, path = trained(place, **settings), Path(folder) / "state.ckpt"
        torch.manual_seed(0)
        # In the second epoch, after a step whose ascent the next one reuses.
        first = trainer(place, StopAt(8), **settings)
        try:
            first.fit()
        except Stop:
            first.save(path)
        torch.manual_seed(1)
        second = trainer(place, **settings)
        second.load(path)
        second.fit()
        apart = unequal(whole, on_cpu(second.model.state_dict()))
    require(not apart, f"the resumed run differs in {len(apart)} tensors, such as {apart[:1]}")
    require(second.execution == first.execution, f"resumed {second.execution}, begun {first.execution}")
    return {"ran_as": str(first.execution), "stopped_at": {"epoch": first.epoch, "step": first.step}}


# Precision.


def check_autocast(place: Place) -> Figures:
    """Training under bfloat16: parameters stay float32, the loss falls and begins near that of float32."""
    losses = {precision: _losses(place, precision) for precision in ("float32", "bfloat16")}
    first = [values[0] for values in losses.values()]
    require(abs(first[1] / first[0] - 1) < 0.1, f"the first losses are {first[0]:g} and {first[1]:g}")
    return losses


def _losses(place: Place, precision: str) -> list[float]:
    run = StopAt()
    made = trainer(place, run, number=8, epochs=2, precision=precision)
    made.fit()
    wrong = [n for n, p in made.model.named_parameters() if p.dtype != torch.float32]
    require(not wrong, f"{wrong[:1]} is not float32")
    require(run.losses[-1] < run.losses[0], f"in {precision} the loss does not fall: {run.losses}")
    return run.losses


def check_scaler(name: str, place: Place) -> Figures:
    """float16 with ``GradScaler``: steps train; one whose gradients overflow is skipped and lowers the scale."""
    kind, data = place.device.type, batches(place, 1)[0]
    model = quantized().to(place.device)
    minimizer = minimizer_of(name, model, rho=0.2)
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**40)  # overflows float16 and goes down from there

    def loss() -> Tensor:
        with torch.autocast(kind, torch.float16):
            logits = model(data[0])
        return F.cross_entropy(logits.float(), data[1])

    start = on_cpu(model.state_dict())
    losses = [minimizer.step(loss, scaler=scaler).item() for _ in range(40)]
    require(scaler.get_scale() < 2.0**40, "no step overflowed")
    require(bool(unequal(start, on_cpu(model.state_dict()))), "no step was taken")
    require(losses[-1] < losses[0], f"the loss does not fall: {losses[0]:g} to {losses[-1]:g}")
    return {"scale": scaler.get_scale(), "first_loss": losses[0], "last_loss": losses[-1]}


# Memory.


def check_memory(place: Place) -> Figures:
    """A batch that does not fit is halved until it does: on a GPU by a real limit, elsewhere by a false error."""
    count = 64 if place.quick else 4096
    settings: dict[str, Any] = {"epochs": 1, "sharpness_batch": count, "ema_decay": 0.0}

    def run(micro_batch: int | None, limit: Callable[[nn.Module], Any]) -> tuple[Recovery, dict[str, Tensor]]:
        torch.manual_seed(0)
        made = trainer(place, number=2, count=count, micro_batch=micro_batch, **settings)
        with deterministic(), limit(made.model):
            made.fit()
        return made.recovery, on_cpu(made.model.state_dict())

    limit = (
        _cuda_limit(place, lambda: run(count // 4, nullcontext))
        if place.cuda
        else partial(_hooked, count // 3)
    )
    recovery, found = run(None, limit)
    size = recovery.micro_batch
    require(size is not None and size <= count // 4, f"the micro-batch is {size} of {count}")
    apart = unequal(found, run(size, nullcontext)[1])
    require(place.cuda or not apart, f"{len(apart)} tensors differ from those of micro-batches of {size}")
    return {"batch": count, "micro_batch": size, "tensors_unlike_micro_batches": len(apart)}


@contextmanager
def _hooked(most: int, model: nn.Module) -> Iterator[None]:
    """Within the context a forward pass of more than ``most`` images runs out of memory."""

    def refuse(module: nn.Module, inputs: Any, output: Any) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.register_forward_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _cuda_limit(place: Place, quarter: Callable[[], Any]) -> Callable[[nn.Module], Any]:
    """A context in which half of the batch does not fit; ``quarter`` runs a quarter of it, to measure what it takes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(place.device)
    before = torch.cuda.memory_allocated(place.device)
    quarter()
    taken = torch.cuda.max_memory_reserved(place.device) - before
    whole = torch.cuda.get_device_properties(place.device).total_memory

    @contextmanager
    def limited(model: nn.Module) -> Iterator[None]:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((before + 1.5 * taken) / whole, place.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, place.device)

    return limited


# Ranks.


class _One(int):
    """The number of ranks, 1, which does not pass for it: so that a single rank takes the paths of several."""

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def check_ranks(place: Place) -> Figures:
    """One rank over NCCL (gloo on a CPU) that takes every collective operation: the step of no group, bit for bit."""
    with deterministic():
        alone = trained(place)
        backend = "nccl" if place.cuda else "gloo"
        if place.cuda:
            torch.cuda.set_device(place.device)
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        count = distributed.count
        distributed.count = lambda: _One(1)  # type: ignore[assignment]
        try:
            require(distributed.totals(1.5, 2.0) == [1.5, 2.0], "sums over ranks are wrong")
            require(distributed.gathered({"a": 1}) == [{"a": 1}], "objects of ranks are wrong")
            require(distributed.from_first(lambda: "b") == "b", "the object of the first rank is wrong")
            joined = trained(place)
        finally:
            distributed.count = count
            dist.destroy_process_group()
    apart = unequal(alone, joined)
    require(not apart, f"{len(apart)} tensors differ, such as {apart[:1]}")
    return {"backend": backend}


def check_torchrun(place: Place) -> Figures:
    """``check_ranks`` in a process that torchrun started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, __file__, str(place.device)], env=environment, capture_output=True, text=True, timeout=120
    )
    require(done.returncode == 0, f"torchrun ended with {done.returncode}: {done.stderr[-600:]}")
    return {"exit_code": done.returncode}


def main() -> None:
    """What torchrun starts: joins its group, then ``check_ranks``."""
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    check_ranks(Place(device))


# Searches, instruments, files.


def check_searcher(name: str, place: Place) -> Figures:
    """A search of few steps ends within the budget; whether the CPU chooses the same is reported."""
    chosen = []
    for device in (place.device, torch.device("cpu")):
        data = batches(Place(device), 4, 16)
        found = saq.search(
            network().to(device), "w4a4", data, searcher=name, options=FAST.get(name), candidates=(2, 4, 6)
        )
        require(found.cost.bops <= found.budget.bops, f"{found.cost} is above the budget {found.budget}")
        chosen.append({layer: str(bits) for layer, bits in found.policy.layers.items()})
    return {"choice_of_cpu": chosen[0] == chosen[1], "layers": len(chosen[0])}


def check_instrument(name: str, place: Place) -> Figures:
    """An instrument of ``saq analyze`` measures a model on the device."""
    settings = {
        "landscape": {"grid": 3},
        "eigenvalue": {"iterations": 3, "starts": 1},
        "trace": {"samples": 2},
    }
    model = quantized().to(place.device)
    given = settings.get(name, {})
    reading = saq.analyze(model, batches(place, 1), [name], settings=given)
    return {"reading": type(reading[name]).__name__}


def check_calibration(place: Place) -> Figures:
    """Quantizing on the device, corrections included: outputs near those of the CPU's levels, every quantizer."""
    figures = {}
    images = batch(64, 7)[0]
    for name in QUANTIZERS:
        scheme = {"quantizer": name} if QUANTIZERS[name].weight else {"activation_quantizer": name}
        for make in (network, attention):
            options: dict[str, Any] = {
                "correct_bias": True,
                "quantize_attention": make is attention,
                **scheme,
            }
            outputs = []
            for device in (torch.device("cpu"), place.device):
                model = saq.quantize_model(
                    make().to(device), "w4a4", calibration=[images.to(device)], **options
                ).eval()
                saq.calibrate(model, [images.to(device)])
                with torch.no_grad():
                    outputs.append(model(images.to(device)).cpu())
            apart = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
            require(apart <= 0.1, f"{name}, {make.__name__}: outputs differ by {100 * apart:.1f} %")
            figures[f"{name} {make.__name__}"] = apart
    return figures


def check_codes(place: Place) -> Figures:
    """Codes of the weights equal those of the CPU; ``codes * step`` is the quantized weight."""
    ours, differing = quantized(), 0
    theirs = copy.deepcopy(ours).to(place.device)
    layers = zip(quantized_layers(ours).values(), quantized_layers(theirs).values(), strict=True)
    for here, there in layers:
        quantizer: Any = there.weight_quantizer
        codes = quantizer.codes(there.latent_weight())
        with torch.no_grad():
            same = torch.equal((quantizer.step() * codes).cpu(), there.quantized_weight().cpu())
        require(same, "codes times step is another weight")
        wanted: Any = here.weight_quantizer
        differing += int((codes.cpu() != wanted.codes(here.latent_weight())).sum())
    require(not differing, f"{differing} codes differ")
    return {"codes_differing": differing}


def check_files(place: Place) -> Figures:
    """A model on the device is saved, and loads with the same outputs."""
    with tempfile.TemporaryDirectory() as folder:
        model, images = quantized().to(place.device).eval(), batch(8, 1)[0]
        path = Path(folder) / "model.safetensors"
        saq.save(model, path)
        loaded = saq.load(path, model=network())
        with torch.no_grad():
            theirs, ours = model(images.to(place.device)).cpu(), loaded(images)
        apart = ((theirs - ours).norm() / ours.norm()).item()
        require(apart <= 0.05, f"the model in the file returns outputs that differ by {apart:g}")
        return {"outputs_apart": apart}


def check_export(style: str, place: Place) -> Figures:
    """A model on the device is exported, with the proof that the file computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        model = quantized("w8a8" if style in ("trt", "qdq-vnni") else "w4a4").to(place.device).eval()
        proved = saq.export_onnx(model, Path(folder) / "model.onnx", style, verify=[batch(16, 1)[0]])
        require(proved.verified, "the file was not verified")
        return {"verified": proved.verified}


# Compilation.


def check_compile(name: str, mode: str, place: Place) -> Figures:
    """Steps through ``torch.compile``, with CUDA graphs in mode reduce-overhead: near eager, no late recompilation."""
    import torch._dynamo as dynamo

    dynamo.reset()
    steps = 4
    losses: dict[str, list[float]] = {}
    graphs: list[int] = []
    before = dynamo.utils.counters["stats"]["unique_graphs"]
    for kind in ("eager", "compiled"):
        model = quantized().to(place.device)
        minimizer = minimizer_of(name, model, rho=0.2)
        run: Any = model
        if kind == "compiled":
            options: dict[str, Any] = {"mode": mode} if place.cuda else {"backend": "eager"}
            run = torch.compile(model, **options)
        losses[kind] = []
        for data in batches(place, steps):
            torch.compiler.cudagraph_mark_step_begin()
            losses[kind].append(minimizer.step(loss_of(run, data)).item())
            if kind == "compiled":
                graphs.append(dynamo.utils.counters["stats"]["unique_graphs"] - before)
    dynamo.reset()
    apart = max(abs(a / b - 1) for a, b in zip(losses["compiled"], losses["eager"], strict=True))
    require(apart < 0.1, f"losses differ by {100 * apart:.1f} %: {losses}")
    late = graphs[-1] - graphs[1]
    require(late == 0, f"{late} graphs were compiled after the second step")
    return {"losses_apart": apart, "graphs": graphs[-1]}


def check_setting(kind: str, place: Place) -> Figures:
    """Training with ``training.compile``: computed as asked for, two runs equal, the loss near that of ``off``.

    Devices for which there is no compiler compute as with ``off``, and say so.
    """
    losses: dict[str, list[float]] = {}
    states: dict[str, list[dict[str, Tensor]]] = {}
    ran = Execution()
    for setting in ("off", kind):
        states[setting] = []
        for _ in range(2):
            run = StopAt()
            torch.manual_seed(0)
            with deterministic():
                made = trainer(place, run, compile=setting, memory_format="contiguous")
                made.fit()
            losses[setting] = run.losses
            states[setting].append(on_cpu(made.model.state_dict()))
            ran = made.execution
    known = place.device.type in ("cpu", "cuda")
    require((ran.kernels == "fused") == known, f"quantizers are computed with {ran.kernels} kernels")
    require(ran.compiled == (kind == "on"), f"{kind} was computed {ran}")
    require(not unequal(*states[kind]), f"two runs that are computed {ran} differ")
    apart = max(abs(a / b - 1) for a, b in zip(losses[kind], losses["off"], strict=True))
    require(apart < (0.1 if known else 1e-9), f"losses differ by {100 * apart:.1f} %: {losses}")
    return {"ran_as": str(ran), "losses_apart": apart}


# The table.


def checks(place: Place) -> dict[str, Check]:
    """The checks of a device by name; plugin tables decide on quantizers, minimizers, searchers, and so on."""
    found: dict[str, Check] = {f"quantizer {name}": partial(check_quantizer, name) for name in QUANTIZERS}
    found |= {f"minimizer {name}": partial(check_minimizer, name) for name in MINIMIZERS}
    found |= {
        "calibration": check_calibration,
        "codes": check_codes,
        "trainer": check_trainer,
        "determinism": check_determinism,
        "resume": check_resume,
        "kernels": partial(check_setting, "kernels"),
        "memory": check_memory,
        "ranks": check_ranks,
    }
    if place.device.type in ("cpu", "cuda"):  # that autocast knows
        found["autocast bfloat16"] = check_autocast
        found |= {f"scaler float16 {name}": partial(check_scaler, name) for name in ("qat", "saq")}
    found |= {f"search {name}": partial(check_searcher, name) for name in SEARCHERS}
    found |= {f"instrument {name}": partial(check_instrument, name) for name in INSTRUMENTS}
    found["files"] = check_files
    styles = ("qdq",) if place.quick else STYLES
    found |= {f"export {style}": partial(check_export, style) for style in styles}
    if place.device.type in ("cpu", "cuda"):
        found["kernels resume"] = partial(check_resume, compile="kernels")
        found["compile saq"] = partial(check_compile, "saq", "default")
    if not place.quick:
        found["compile on"] = partial(check_setting, "on")
        found["compile on resume"] = partial(check_resume, compile="on")
        found["compile qat"] = partial(check_compile, "qat", "default")
        found["torchrun"] = check_torchrun
    if place.cuda:
        found |= {
            f"graphs {name}": partial(check_compile, name, "reduce-overhead") for name in ("qat", "saq")
        }
    return found


if __name__ == "__main__":
    main()
