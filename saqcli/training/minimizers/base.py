"""What every minimizer shares: the step, its two passes, gradients averaged over ranks, checks for NaN and infinity.

A minimizer derives from ``Minimizer`` and overrides one or both of two calls:

    ascend     pass 1 over a chunk: its loss, and the perturbed point at which pass 2 takes place
    descend    changes the gradients of pass 2, before the base optimizer updates the weights by them

A loss or gradient that is NaN or infinite stops training before it touches the weights.

Fake quantization hides an overflow from later layers, since it clamps: it must be caught in the step that made it.

A minimizer gets the images of a step in chunks, cut into what fits in memory.

step          all images that one update learns from
chunk         the images that share one perturbation (m-sharpness; by default all of them)
micro-batch   the images of one forward pass; gradients of a chunk's micro-batches add up

Between the backward passes and the update, the results of all ranks are averaged and checked.

Every rank passes over its own images, which leaves gradients in its parameters. One all-reduce then gives all of them
the mean, together with the loss, norms and the running statistics of batch norms, so that all ranks hold the same
numbers after every step. NaN or infinity on one rank makes it so on all of them, and no weight is touched.

The pipelines do not use DistributedDataParallel: it reduces within the backward pass, where a rank that ran out of
memory could no longer notify the others (``docs/decisions/0016-one-all-reduce-a-step.md``). A module that is wrapped in
it runs both passes under ``no_sync``.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.errors import ConfigError, TrainingDiverged, UnsupportedModel
from saqcli.quant.layer import QuantizedLayer, back_propagate, weight_owners, weights_given
from saqcli.training.minimizers.reference import Problem
from saqcli.training.options import plain_number
from saqcli.training.perturbation import Gradients, PerturbedSet, add_up, scaled

RUN_ADVICE = (
    "start again with a lower `training.lr`, or `training.rho`, and `overwrite=True`; checkpoints/ holds the last good "
    "state"
)
LOOP_ADVICE = "no weight was changed; lower the learning rate or the radius"


def check_step(loss: Tensor, *norms: Tensor, advice: str = RUN_ADVICE) -> None:
    """Check loss and gradients before the optimizer's step.

    Raises:
        TrainingDiverged: the loss, or a norm of its gradients, is not finite.
    """
    values = [loss.item(), *(norm.item() for norm in norms)]
    if not all(map(math.isfinite, values)):
        what = f"the loss is {values[0]:g}"
        if math.isfinite(values[0]):
            what += " but its gradient is not finite"
        raise TrainingDiverged(f"{what} and cannot be descended: {advice}")


def check_epoch(loss: float, largest: float) -> None:
    """Check the validation loss after an epoch.

    Raises:
        TrainingDiverged: it is not finite, or above ``largest``.
    """
    if not loss <= largest:
        raise distributed.reported_once(
            TrainingDiverged(f"the validation loss has become {loss:g}: {RUN_ADVICE}")
        )


def check_score(loss: float, images: int, name: str) -> None:
    """Check the loss of a network outside training.

    Raises:
        UnsupportedModel: it is not finite.
    """
    if not math.isfinite(loss):
        raise UnsupportedModel(
            f"the loss of {name} is {'NaN' if math.isnan(loss) else 'infinite'} on {images} images: its numbers "
            "overflow; check its weights, `model.mean`, `model.std` and `model.input_size`"
        )


TOLERANCE = 1e-5  # of the sum of shares, for rounding


class Loss(Protocol):
    """Runs the forward pass on a micro-batch."""

    def __call__(self, *, ascent: bool = False) -> Tensor:
        """Mean loss over the images; may be called more than once.

        Args:
            ascent: only a direction is sought, so that a part of the images, or a lower precision, may do.
        """


class MicroBatch(NamedTuple):
    """Images of one forward pass.

    Attributes:
        loss: their mean loss; a closure as of ``Minimizer.step``, with or without ``ascent``.
        share: of the step's images, above 0; the shares of a step sum to 1.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> minimizer = Minimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> parts = [(torch.ones(3, 2), 0.75), (torch.ones(1, 2), 0.25)]
        >>> loss = minimizer.step([MicroBatch(lambda x=x: model(x).mean(), share) for x, share in parts])
    """

    loss: Callable[..., Tensor]
    share: float


Chunk = Sequence[MicroBatch]
Closure = Callable[[], Tensor]  # runs the forward pass and returns the mean loss
Part = Closure | MicroBatch
Work = Part | Sequence[Part] | Sequence[Sequence[Part]]


def accumulate(
    micro_batches: Iterable[MicroBatch], layers: Iterable[QuantizedLayer] = (), scale: float = 1.0
) -> Tensor:
    """Back-propagate the micro-batches one after the other, into ``.grad``; returns their part of the step's loss.

    Args:
        micro_batches: images and their losses.
        layers: whose weights are given; the gradients that these collect are passed on.
        scale: factor of the gradients, against underflow in float16; not of the returned loss.
    """
    losses = []
    for micro_batch in micro_batches:
        loss = micro_batch.loss() * micro_batch.share
        scaled(loss, scale).backward()  # type: ignore[no-untyped-call]
        back_propagate(layers)
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def gradients_of(
    chunk: Chunk,
    members: PerturbedSet,
    *,
    ascent: bool = False,
    through_rounding: bool = False,
    also: Sequence[nn.Parameter] = (),
    scale: float = 1.0,
) -> tuple[Tensor, Gradients]:
    """Mean loss of the chunk, and its gradients as from ``members.gradients``: none accumulates anywhere.

    Args:
        chunk: micro-batches whose gradients add up.
        members: to whose tensors the loss is differentiated.
        ascent: only a direction is sought, see ``Loss``.
        through_rounding: as in ``PerturbedSet.gradients``.
        also: further parameters, whose gradients come last.
        scale: factor of the backward pass, against underflow in float16; the results are divided by it.
    """
    whole = sum(micro_batch.share for micro_batch in chunk)
    losses: list[Tensor] = []
    total: Gradients = []
    for micro_batch in chunk:
        loss, gradients = members.gradients(
            partial(micro_batch.loss, ascent=ascent),
            through_rounding=through_rounding,
            also=also,
            scale=scale,
        )
        part = micro_batch.share / whole
        losses.append(loss * part)
        total = add_up(total, gradients, part)
    return torch.stack(losses).sum(), total


_NORMS = nn.modules.batchnorm._NormBase


class Passes(NamedTuple):
    """What the passes of a step found beside the gradients that they left in the parameters.

    Attributes:
        loss: mean over the step's images, at the unperturbed weights.
        norms: further numbers that must be finite.
        plain: gradients at the unperturbed weights, one per trained parameter, where they are wanted; else empty.
        ascended: whether there was an ascent.
    """

    loss: Tensor
    norms: list[Tensor]
    plain: list[Tensor]
    ascended: bool = False


class Ascent(NamedTuple):
    """Pass 1 over a chunk.

    Attributes:
        loss: mean over the chunk's images, at the unperturbed weights; None where there was no pass, so that the loss
            at the perturbed point is reported.
        point: context in which the model computes at the perturbed point, as it was before afterwards.
        norms: numbers that must be finite, such as the norm of the gradient.
        plain: gradients at the unperturbed weights, one per trained parameter; empty where ``descend`` needs none.
    """

    loss: Tensor | None
    point: AbstractContextManager[None]
    norms: Sequence[Tensor] = ()
    plain: Sequence[Tensor | None] = ()


class Scaler(Protocol):
    """``torch.amp.GradScaler``, as far as a step needs it."""

    def scale(self, outputs: Tensor) -> Tensor:
        """``outputs`` times the scale."""

    def is_enabled(self) -> bool:
        """Whether it scales."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale."""

    def step(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer's step, unless a gradient was not finite."""

    def update(self) -> None:
        """Raise or lower the scale."""


class Minimizer:
    """Moves the weights once per step, by a base optimizer; without an ascent, plain training.

    To write one, override ``ascend``, ``descend`` or both, and set ``description`` and ``reference``. Further settings
    are keyword arguments of the constructor, which checks them; the table ``training.minimizer`` passes them. Arguments
    named ``rho``, ``rho_unit``, ``perturb``, ``interval``, ``reuse`` and ``start`` receive the settings
    ``training.rho``, ``rho_unit``, ``perturb``, ``sam_interval``, ``sam_reuse`` and ``sharpness_from`` (in steps).

    A minimizer with a radius must equal plain training bit for bit at ``rho=0``. It must not touch the random numbers,
    the running statistics (beyond one update per step) or ``requires_grad``, and its state must be tensors and plain
    values.

    Attributes:
        description: one phrase for lists of methods.
        wants_plain: whether ``descend`` receives the gradients at the unperturbed weights. Since it compares them with
            those at the perturbed point, both passes must see the same images: ``training.ascent_fraction`` is refused.
        one_pass: whether an ascent takes no pass of its own, so that ``training.ascent_fraction`` and
            ``ascent_precision`` have no effect and are refused.
        ignored: settings above that may be given though they have no effect: a baseline accepts what others need.
        model: whose weights are trained; its float class, or wrapped by DistributedDataParallel or ``torch.compile``.
        base: the optimizer that updates the weights.
        scale: factor of the current backward passes; 1 unless a ``GradScaler`` is given. ``gradients_of`` takes it.

    Args:
        model: in training mode when steps are taken.
        base: over parameters of ``model``.

    Raises:
        ConfigError: no parameter of ``base`` belongs to ``model``, or its step needs a closure.
    """

    description: ClassVar[str] = ""
    wants_plain: ClassVar[bool] = False
    one_pass: ClassVar[bool] = False
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        closure = inspect.signature(type(base).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ConfigError(
                f"{type(base).__name__} calls a closure in its step, and a minimizer updates from gradients alone: use "
                "an optimizer such as SGD or AdamW"
            )
        self.model = model
        self.base = base
        self.scale = 1.0
        known = {id(parameter) for parameter in model.parameters()}
        if self.trained and not any(id(parameter) in known for parameter in self.trained):
            raise ConfigError(
                "the optimizer holds no parameter of the model: create it from the parameters of the quantized model, "
                "which may be a copy"
            )

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that the base optimizer updates."""
        return [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]

    def step(self, closure: Work, *, clip_grad: float | None = None, scaler: Scaler | None = None) -> Tensor:
        """One update; gradients in all parameters of the model are cleared first.

        Args:
            closure: runs the forward pass and returns the mean loss, a scalar tensor; it does not call ``backward``,
                and is called once per pass. A list of closures are micro-batches of equal weight: their gradients add
                up, and they share one perturbation. A list of lists are chunks of such micro-batches, each chunk with
                a perturbation of its own; ``MicroBatch(closure, share)`` takes the place of a closure where weights
                differ: closures without a share share equally what is left of 1.
            clip_grad: largest joint norm of the gradients that the base optimizer receives; pass 1 is not clipped.
            scaler: ``torch.amp.GradScaler``; its ``scale``, ``unscale_``, ``step`` and ``update`` are called here, and
                the closure returns the loss unscaled: scaled there too, it would be scaled twice, unnoticed. If
                gradients overflow in either pass the step is skipped and the scale lowered; an infinite loss at the
                unperturbed weights is no matter of scale and raises.

        Returns:
            The mean loss at the unperturbed weights, detached; over all ranks if there are several.

        Raises:
            ConfigError: a closure called ``backward``, or did not return a scalar with a graph; shares do not sum
                to 1; or parameters were frozen or unfrozen since a minimizer with an ascent was made.
            TrainingDiverged: the loss or a gradient is NaN or infinite; no weight was changed.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> minimizer = Minimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> minimizer.step(lambda: model(torch.ones(4, 2)).square().mean()).requires_grad
            False
        """
        if clip_grad is not None:
            clip_grad = plain_number("clip_grad", clip_grad, least=0)
        self.scale = _scale_of(scaler, self.trained)
        try:
            with torch.enable_grad():
                passes = self.gradients(_as_chunks(closure, self.trained))
        finally:
            self.scale = 1.0
        return self.update(passes, clip_grad=clip_grad, scaler=scaler, advice=LOOP_ADVICE)

    def ascend(self, chunk: Chunk) -> Ascent | None:
        """Pass 1 over a chunk: where its pass 2 takes place; None for a plain pass at the weights.

        Runs on the images of this rank. Gradients must not be left in the parameters: see ``gradients_of``. Quantized
        weights are leaves (``layer.weights_given``): gradients of what they are computed from come from it, too.
        """
        return None

    def descend(self, passes: Passes) -> None:
        """Change ``.grad``, the mean gradients of pass 2 over all ranks, before the base optimizer's step.

        Called once per update, not in steps that are skipped, so that state belongs here.

        Args:
            passes: of all ranks; ``plain`` holds the gradients at the unperturbed weights, if ``ascend`` returned them.
        """

    def gradients(self, chunks: Sequence[Chunk]) -> Passes:
        """All passes over the images: fills the gradients of the parameters, changes neither weights nor state.

        After an ascent the gradients are those at the perturbed points. Weights are quantized once for all passes.
        """
        self.base.zero_grad()
        self.model.zero_grad()  # those outside the optimizer too
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        plain: Gradients = []
        ascended = False
        owners = weight_owners(self.model)
        with _without_reducer(self.model), weights_given(owners):
            for chunk in chunks:
                ascent = self.ascend(chunk)
                if ascent is None:
                    losses.append(accumulate(chunk, owners, self.scale))
                    continue
                with ascent.point:
                    perturbed_loss = accumulate(chunk, owners, self.scale)
                ascended = True
                share = sum(micro_batch.share for micro_batch in chunk)
                losses.append(perturbed_loss if ascent.loss is None else ascent.loss * share)
                norms += [*ascent.norms, perturbed_loss]
                plain = add_up(plain, list(ascent.plain), share)
        known = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.trained if plain else (), plain, strict=True)
        ]
        return Passes(torch.stack(losses).sum(), norms, known, ascended)

    def update(
        self,
        passes: Passes,
        *,
        clip_grad: float | None = None,
        scaler: Scaler | None = None,
        advice: str = RUN_ADVICE,
    ) -> Tensor:
        """Update the weights by the mean of these passes over all ranks; returns the mean loss.

        Args:
            passes: from ``gradients``.
            clip_grad: as in ``step``.
            scaler: as in ``step``.
            advice: what to do if the loss is not finite, for the message.

        Raises:
            TrainingDiverged: the loss or a gradient is NaN or infinite; nothing was changed.
        """
        passes = average(self.model, self.trained, passes)
        if scaler is not None and scaler.is_enabled():
            if not (
                self.one_pass and passes.ascended
            ):  # whose loss is that at the perturbed point, one of the norms
                check_step(passes.loss, advice=advice)
            if not _unscale(self.base, self.trained, passes, scaler):
                scaler.step(self.base)  # does nothing
                scaler.update()
                return passes.loss
        given = [p.grad for p in self.trained if p.grad is not None]
        check_step(
            passes.loss, *passes.norms, *([nn.utils.get_total_norm(given)] if given else []), advice=advice
        )
        plain = [gradient.clone() for gradient in passes.plain]
        distributed.average(plain)
        self.descend(passes._replace(plain=plain))
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(self.trained, clip_grad)
        if scaler is None:
            self.base.step()
        else:
            scaler.step(self.base)
            scaler.update()
        return passes.loss

    def state_dict(self) -> dict[str, Any]:
        """State in addition to that of the base optimizer; tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``: the following steps are the same."""

    @staticmethod
    def reference(
        problem: Problem, state: dict[str, Any], **options: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """One step with an ascent, written again on plain float64 tensors; the contract tests compare with it.

        Args:
            problem: see ``Problem``.
            state: empty at the first step; for numbers that are kept between steps.
            options: the keyword arguments of the constructor, those that tests set: ``rho`` and ``rho_unit``.

        Returns:
            The loss at the unperturbed weights, and for every parameter the gradient that the base optimizer gets.
        """
        raise NotImplementedError


def _as_chunks(work: Work, trained: Sequence[nn.Parameter]) -> list[Chunk]:
    """The closures of a step as chunks; those without a weight share what is left equally.

    Raises:
        ConfigError: there is none, something else is given, or the shares do not sum to 1.
    """
    items: Any = [work] if callable(work) or isinstance(work, MicroBatch) else work
    nested = isinstance(items, list | tuple) and all(
        isinstance(i, list | tuple) and not isinstance(i, MicroBatch) and i for i in items
    )
    chunks: Any = items if nested else [items]
    try:
        closures = [closure for chunk in chunks for closure in chunk]
    except TypeError:
        closures = []
    if not closures or not all(callable(closure) or isinstance(closure, MicroBatch) for closure in closures):
        raise ConfigError(
            "a step takes a closure that returns the loss, or a list of closures, such as "
            "`lambda: criterion(model(x), y)`"
        )
    share = _share_left(closures)
    return [
        [
            MicroBatch(_checked(item.loss, trained), item.share)
            if isinstance(item, MicroBatch)
            else MicroBatch(_checked(item, trained), share)
            for item in chunk
        ]
        for chunk in chunks
    ]


def _share_left(closures: Sequence[Any]) -> float:
    """The share of a closure that has none of its own."""
    shares = [closure.share for closure in closures if isinstance(closure, MicroBatch)]
    left, others = 1 - sum(shares), len(closures) - len(shares)
    if min(shares, default=1) <= 0 or not (left > TOLERANCE if others else abs(left) <= TOLERANCE):
        given = ", ".join(f"{float(each):g}" for each in shares)
        raise ConfigError(
            f"micro-batches have the shares {given}: give each the part of the step's images that it holds, above 0 "
            "and 1 in all"
        )
    return left / others if others else 0.0


def _takes_ascent(loss: Callable[..., Tensor]) -> bool:
    try:
        found = inspect.signature(loss).parameters.values()
    except ValueError:  # written in C
        return False
    return any(each.name == "ascent" or each.kind is each.VAR_KEYWORD for each in found)


def _checked(closure: Callable[..., Tensor], trained: Sequence[nn.Parameter]) -> Loss:
    """A closure of the user as a ``Loss``, whose result is checked."""
    takes_ascent = _takes_ascent(closure)

    def run(*, ascent: bool = False) -> Tensor:
        before = [_version(p) for p in trained]
        loss: Any = closure(ascent=ascent) if takes_ascent else closure()
        problem = None
        if not isinstance(loss, Tensor):
            problem = f"returned a {type(loss).__name__}"
        elif loss.numel() != 1 or not loss.is_floating_point():
            problem = f"returned a tensor of shape {tuple(loss.shape)} and type {loss.dtype}"
        elif [_version(p) for p in trained] != before:
            problem = "called backward, which the minimizer does"
        elif not loss.requires_grad:
            problem = "returned a loss without a graph, such as that of .detach() or under no_grad"
        if problem:
            raise ConfigError(
                f"the closure {problem}: run the forward pass and return the mean loss, a scalar tensor"
            )
        value: Tensor = loss.reshape(())
        return value

    return run


def _version(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Changes whenever a gradient is written to."""
    return None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


@contextmanager
def _without_reducer(model: nn.Module) -> Iterator[None]:
    """Within the context DistributedDataParallel leaves gradients alone: ``average`` reduces them.

    Its reducer acts on ``backward`` alone, so not on pass 1, and would broadcast running statistics between passes.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def _scale_of(scaler: Scaler | None, trained: Sequence[nn.Parameter]) -> float:
    if scaler is None or not scaler.is_enabled():
        return 1.0
    device = trained[0].device if trained else None
    return float(scaler.scale(torch.ones((), device=device)))


def _unscale(
    base: torch.optim.Optimizer, trained: Sequence[nn.Parameter], passes: Passes, scaler: Scaler
) -> bool:
    """Divide the gradients by the scale; whether they and the norms of pass 1 are finite."""
    given = [p.grad for p in trained if p.grad is not None]
    if given and not all(math.isfinite(norm.item()) for norm in passes.norms):
        given[0].fill_(
            math.nan
        )  # makes the scaler skip the step: pass 2 may have clamped what overflowed in pass 1
    scaler.unscale_(base)
    return not given or math.isfinite(nn.utils.get_total_norm(given).item())


def average(model: nn.Module, trained: Sequence[nn.Parameter], passes: Passes) -> Passes:
    """The means over all ranks; those of gradients and running statistics are left in the model."""
    passes = passes._replace(loss=passes.loss.clone(), norms=[norm.clone() for norm in passes.norms])
    average_gradients(trained, [passes.loss, *passes.norms, *running_statistics(model)])
    return passes


def average_gradients(parameters: Iterable[nn.Parameter], also: Iterable[Tensor] = ()) -> None:
    """Means over the ranks, in place, of the parameters' gradients and of the tensors ``also``.

    A parameter that took no part on this rank may have taken part on another: it counts with zeros, and stays without
    a gradient where it has none anywhere.
    """
    if distributed.count() == 1:
        return
    parameters = list(parameters)
    given = [p.grad is not None for p in parameters]
    anywhere = distributed.totals(*map(float, given))
    for parameter, count in zip(parameters, anywhere, strict=True):
        if parameter.grad is None and count:
            parameter.grad = torch.zeros_like(parameter)
    distributed.average([*also, *(p.grad for p in parameters if p.grad is not None)])


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances that batch norms keep."""
    return [
        statistic
        for norm in model.modules()
        if isinstance(norm, _NORMS)
        for statistic in (norm.running_mean, norm.running_var)
        if statistic is not None
    ]


def orthogonal_part(vectors: Sequence[Tensor], to: Sequence[Tensor]) -> list[Tensor]:
    """``vectors`` without their component along ``to``, each taken as one vector; exactly 0 if they are equal."""
    ratio = inner(to, vectors) / inner(to, to).clamp_min(torch.finfo(torch.float32).tiny)
    return [vector - ratio * other for vector, other in zip(vectors, to, strict=True)]


def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Inner product over all tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
