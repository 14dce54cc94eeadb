"""The loop over blocks: activations, errors, resume, ranks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saqcli
from saqcli.errors import DataError, UnsupportedModel
from saqcli.quant.calls import Call
from saqcli.reconstruction.activations import CHUNK, Activations, samples_of
from saqcli.reconstruction.blocks import find_blocks
from saqcli.reconstruction.options import Reconstruction
from saqcli.reconstruction.reconstruct import reconstruct, without_quantizers
from tests.support.joined import ranks_run
from tests.support.modules import HandWritten, TwoInputs

IMAGES = 20
OPTIONS = Reconstruction(iterations=6, batch_size=8)


def images(seed: int = 3) -> Tensor:
    return torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def quantized(kind: Callable[[], nn.Module] = HandWritten, bits: int = 3) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = saqcli.quantize_model(kind(), bits, calibration=[images()], recalibrate_bn=False)
    return model, without_quantizers(model)


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Interruption(Exception):
    pass


class Stopping:
    """A memory that is asked to stop at an offer; saves a copy, as a file would."""

    def __init__(self, stop: int, state: dict[str, Any] | None = None) -> None:
        self.stop, self.state, self.offers = stop, state, 0

    def load(self) -> dict[str, Any] | None:
        return copy.deepcopy(self.state)

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        self.offers += 1
        if self.offers == self.stop:
            self.state = copy.deepcopy(state())
            raise Interruption

    def restore_random(self) -> None:
        pass


class Told:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int]] = []
        self.steps: list[int] = []
        self.figures: list[dict[str, float]] = []
        self.notes: list[str] = []

    def task(self, title: str, total: int) -> "Told":
        self.tasks.append((title, total))
        self.steps.append(0)
        return self

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        self.steps[-1] += steps
        if figures:
            self.figures.append(figures)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_no_block_becomes_worse() -> None:
    model, in_float = quantized()
    told = Told()
    kept = bits_of(in_float)

    errors = reconstruct(model, in_float, [images()], OPTIONS, progress=told)

    assert [error.name for error in errors] == ["stem", "left to right", "head"]
    assert all(error.after <= error.before for error in errors)
    assert any(error.after < error.before for error in errors)
    count = len(errors)
    assert told.tasks == [(f"{error.name}, block {i} of {count}", 6) for i, error in enumerate(errors, 1)]
    assert told.steps == [6, 6, 6]
    assert told.figures[-1] == {"before": errors[-1].before, "after": errors[-1].after}
    assert same(kept, bits_of(in_float))


def test_no_iterations_change_nothing() -> None:
    model, in_float = quantized()
    before = bits_of(model)

    errors = reconstruct(model, in_float, [images()], Reconstruction(iterations=0))

    assert same(before, bits_of(model))
    assert all(error.after == error.before for error in errors)


def test_recomputed_activations_have_the_same_bits() -> None:
    results = []
    for limit in (None, 0, 400_000):
        model, in_float = quantized()
        errors = reconstruct(model, in_float, [images()], OPTIONS, limit=limit)
        results.append((errors, bits_of(model)))

    for errors, state in results[1:]:
        assert errors == results[0][0]
        assert same(state, results[0][1])


@pytest.mark.parametrize("fisher", [False, True])
def test_activations_equal_the_networks_own(fisher: bool) -> None:
    model, in_float = quantized()
    x = images()
    blocks = find_blocks(model, x)
    for limit in (None, 0):
        activations = Activations(model, in_float, blocks, x, limit=limit, fisher=fisher)
        index = torch.tensor([17, 3, 4, 0])
        inner, in_float_inner = x[index], x[index]
        for number, block in enumerate(blocks):
            data = activations.at(number)
            assert data.kept is (limit is None)
            assert (data.inputs is data.float_inputs) is (number == 0)
            target = block(in_float, in_float_inner)
            assert torch.allclose(data.inputs[index], inner, atol=1e-5)
            assert torch.allclose(data.float_inputs[index], in_float_inner, atol=1e-5)
            assert torch.allclose(data.targets[index], target, atol=1e-5)
            if fisher:
                assert data.weights is not None
                assert data.weights[index].shape == target.shape
                assert bool((data.weights[index] >= 0).all())
            inner, in_float_inner = block(model, inner), target


def test_only_one_block_runs_where_all_is_kept() -> None:
    model, in_float = quantized()
    x = images()
    activations = Activations(model, in_float, find_blocks(model, x), x)
    for number in range(2):
        activations.at(number)
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, given, output, name=name: calls.append(name))

    activations.at(2)

    layers = [name for name in calls if name in ("stem", "left", "right", "head")]
    assert set(layers) == {"left", "right"}
    assert len(layers) == 2 * (1 + -(-IMAGES // CHUNK))  # the first chunk once more, to know the sizes


@pytest.mark.parametrize("stop", [3, 7, 10, 14])
def test_resume_gives_the_same_bits(stop: int) -> None:
    model, in_float = quantized()
    expected = reconstruct(model, in_float, [images()], OPTIONS)
    interrupted, _ = quantized()
    memory = Stopping(stop)
    with pytest.raises(Interruption):
        reconstruct(interrupted, in_float, [images()], OPTIONS, memory=memory)

    resumed, _ = quantized()
    told = Told()
    errors = reconstruct(
        resumed, in_float, [images()], OPTIONS, memory=Stopping(0, memory.state), progress=told
    )

    assert errors == expected
    assert same(bits_of(resumed), bits_of(model))
    assert told.steps[0] == 6  # those before the interruption are reported


def test_two_inputs() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(IMAGES, 4, generator=torch.Generator().manual_seed(1))
    call = Call((images(), numbers))
    model = saqcli.quantize_model(TwoInputs(), 3, calibration=[call])
    in_float = without_quantizers(model)
    states = []
    for limit in (None, 0):
        one = copy.deepcopy(model)
        errors = reconstruct(one, in_float, [call], OPTIONS, limit=limit)
        states.append(bits_of(one))
        assert len(errors) == 2
        assert all(error.after <= error.before for error in errors)
    assert same(*states)
    assert not same(states[0], bits_of(model))


def test_calls_that_cannot_be_joined() -> None:
    with pytest.raises(DataError, match="no calibration images"):
        samples_of([])
    with pytest.raises(UnsupportedModel, match="different sizes"):
        samples_of([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)])


def on_a_rank(count: int) -> tuple[list[tuple[str, float, float]], dict[str, Tensor]]:
    model, in_float = quantized()
    errors = reconstruct(model, in_float, [images()[:count]], OPTIONS)
    return [tuple(error) for error in errors], bits_of(model)


@pytest.mark.slow
def test_ranks_share_images() -> None:
    one, other = ranks_run(2, on_a_rank, 19)

    assert one[0] == other[0]
    assert same(one[1], other[1])
    assert all(after <= before for _, before, after in one[0])
    alone = on_a_rank(18)
    assert alone[0][0][1] == pytest.approx(one[0][0][1], rel=1e-4)  # the error of the first block before
