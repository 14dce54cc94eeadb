"""Reconstruction of a whole network: block after block, each on the outputs of those before it.

A block is fitted to the float block on unlabelled images (``block``), and the next one sees what it gives now. Nothing
else of the network changes meanwhile, so what was done is done: the state of a run is the network after the finished
blocks, and the state of the fit within the current one.

On several ranks each has its share of the images, and all end with the same bits.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import CorruptArtifact
from saqcli.progress import SILENT, Progress, Task
from saqcli.quant.calls import Call
from saqcli.quant.junctions.sharing import activation_places
from saqcli.quant.kernels.use import fused_on_cpu
from saqcli.quant.layer import in_eval_mode, quantized_layers
from saqcli.random_state import seeds_of
from saqcli.reconstruction.activations import Activations, samples_of
from saqcli.reconstruction.block import BlockError, fit_block
from saqcli.reconstruction.blocks import find_blocks
from saqcli.reconstruction.coordinate_descent import SWEEPS, descend_block, norms_after
from saqcli.reconstruction.options import Reconstruction
from saqcli.training.loop import NO_MEMORY, Memory


def without_quantizers(model: nn.Module) -> nn.Module:
    """A copy of a quantized network that computes in floating point, with its present weights and statistics."""
    made = copy.deepcopy(model)
    for layer in quantized_layers(made).values():
        layer.weight_quantizer = nn.Identity()
    for place in activation_places(made).values():
        place.put(nn.Identity())
    return made.eval().requires_grad_(False)


def reconstruct(
    model: nn.Module,
    float_model: nn.Module,
    calls: Iterable[Tensor | Call],
    options: Reconstruction,
    *,
    seed: int = 0,
    memory: Memory = NO_MEMORY,
    progress: Progress = SILENT,
    limit: int | None = None,
) -> list[BlockError]:
    """Fit every block of ``model`` to that of ``float_model``, in place, in order of execution.

    Args:
        model: quantized, levels fitted; its mode is restored. When resumed, as it was before the first block.
        float_model: its float network: a copy of the wrapped model, with the original weights and statistics.
        calls: calibration images, (N, C, H, W), or other calls, on the model's device; on all ranks the same.
        options: of each block; with 0 iterations nothing changes.
        seed: of all random numbers.
        memory: state of an earlier, interrupted reconstruction; the resumed one gives the same bits.
        progress: one task a block, titled with its place among all, with its error before and after.
        limit: bytes of memory for activations; None for half of what is free.

    Returns:
        The error of every block before and after.

    Raises:
        UnsupportedModel: the network does not run, or its inputs are lists.
        DataError: there are no images.
        CorruptArtifact: the saved state is that of another network.
        Interrupted: a signal asked to stop; the state is saved.
    """
    images = samples_of(calls)
    blocks = find_blocks(model, images[torch.arange(min(2, len(images)))])
    for note in dict.fromkeys(f"{block.name}: {block.note}" for block in blocks if block.note):
        progress.note(note)
    run = _Run(model, memory, [block.name for block in blocks])
    descends = options.form == "descent"
    norms = norms_after(float_model, Call.of(images[torch.arange(min(2, len(images)))])) if descends else {}
    with in_eval_mode(model), in_eval_mode(float_model), fused_on_cpu(model):
        activations = Activations(
            model,
            float_model,
            blocks,
            images,
            limit=limit,
            seed=seed,
            fisher=options.weighting == "fisher",
        )
        for index in range(len(run.done), len(blocks)):
            block, data = blocks[index], activations.at(index)
            generator = torch.Generator().manual_seed(seeds_of(seed, index)[2] % 2**63)
            title = f"{block.name}, block {index + 1} of {len(blocks)}"
            with progress.task(title, 1 if descends else options.iterations) as task:
                if descends:
                    error = descend_block(
                        block,
                        model,
                        float_model,
                        data.inputs,
                        data.float_inputs,
                        data.targets,
                        norms,
                        batch_size=options.batch_size,
                        sweeps=min(options.iterations, SWEEPS),
                    )
                    task.advance(images=len(data.inputs))
                else:
                    error = fit_block(
                        block,
                        model,
                        data.inputs,
                        data.float_inputs,
                        data.targets,
                        options,
                        generator,
                        run.of_block(task, options),
                        weights=data.weights,
                    )
                task.advance(0, before=error.before, after=error.after)
            run.finish(error)
    return run.done


class _Run:
    """The state of a reconstruction: the finished blocks, the network after them, and the fit of the current block.

    Args:
        model: is set to the saved state, if there is one.
        memory: holds the state.
        names: of all blocks.

    Attributes:
        done: errors of the finished blocks.
    """

    def __init__(self, model: nn.Module, memory: Memory, names: list[str]) -> None:
        self.done: list[BlockError] = []
        self._model, self._memory, self._names = model, memory, names
        self._fit: dict[str, Any] | None = None
        state = memory.load()
        if state is not None:
            if state["blocks"] != names:
                raise CorruptArtifact("the saved reconstruction has other blocks: it is of another network")
            model.load_state_dict(state["model"])
            self.done = [BlockError(*error) for error in state["done"]]
            self._fit = state["fit"]
            memory.restore_random()
        self._start = self._snapshot()

    def of_block(self, task: Task, options: Reconstruction) -> "_BlockMemory":
        """The memory of the current block."""
        fit, self._fit = self._fit, None
        return _BlockMemory(self._memory, self._state, task, options.batch_size, fit)

    def finish(self, error: BlockError) -> None:
        """Note the current block as finished.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
        """
        self.done.append(error)
        self._start = self._snapshot()
        self._memory.offer(lambda: self._state(None), milestone=True)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._model.state_dict().items()}

    def _state(self, fit: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "blocks": self._names,
            "done": [list(error) for error in self.done],
            "model": self._start,
            "fit": fit,
        }


class _BlockMemory:
    """The state of one block within that of the whole reconstruction; every offer reports an iteration."""

    def __init__(
        self,
        memory: Memory,
        state: Callable[[dict[str, Any] | None], dict[str, Any]],
        task: Task,
        images: int,
        fit: dict[str, Any] | None,
    ) -> None:
        self._memory, self._state, self._task, self._images, self._fit = memory, state, task, images, fit
        if fit is not None:
            task.advance(int(fit["done"]))

    def load(self) -> dict[str, Any] | None:
        """The state of this block, or None if it has not begun."""
        return self._fit

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Offer the state of this block with that of all before it."""
        self._task.advance(images=self._images)
        self._memory.offer(lambda: self._state(state()), milestone=milestone, failing=failing)

    def restore_random(self) -> None:
        """Nothing to restore: all random numbers are drawn from the generator of the block."""
