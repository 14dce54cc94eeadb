"""What modules and loaders of one's own may give: dtypes, labels, signatures of a forward, examples."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import saqcli as saq
from saqcli.api.batches import BatchReader
from saqcli.errors import DataError, UnsupportedModel
from tests.support.modules import CLASSES, HandWritten, TwoInputs, build, inputs_of, labels_of, small

X, Y = inputs_of("hand_written")[0], labels_of()
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def quantized(net: nn.Module | None = None, **options: Any) -> nn.Module:
    options = options or {"calibration": [(X, Y)]}
    return saq.quantize_model(net or build("hand_written"), 4, **options).eval()


# Dtypes


@pytest.mark.parametrize("of_module", FLOATS)
@pytest.mark.parametrize("of_batch", FLOATS)
def test_batches_take_the_type_of_the_module(of_module: torch.dtype, of_batch: torch.dtype) -> None:
    net = small().to(of_module)
    assert saq.evaluate(net, [(X.to(of_batch), Y)]).images == 8
    assert saq.evaluate(
        saq.quantize_model(net, 4, calibration=[X.to(of_batch)]), [(X.to(of_batch), Y)]
    ).images


def test_images_of_bytes_are_refused() -> None:
    with pytest.raises(DataError, match=r"are uint8: convert them to floats"):
        saq.evaluate(build("hand_written"), [(X.byte(), Y)])
    with pytest.raises(DataError, match=r"are uint8: convert them to floats"):
        quantized(calibration=[X.byte()])


def test_module_that_takes_bytes_gives_inputs() -> None:
    class OfBytes(HandWritten):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    q = quantized(OfBytes(), calibration=[(X.byte(), Y)], inputs=lambda batch: batch[0])
    assert saq.evaluate(q, [(X.byte(), Y)], inputs=lambda batch: batch[0]).images == 8


# Labels

GOOD_LABELS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
BAD_LABELS: dict[str, tuple[Tensor, str]] = {
    "column": (Y[:, None], r"are int64 of \(8, 1\), which are no classes: give integers \(8,\), from 0 to 4"),
    "floats": (Y.float(), r"are float32 of \(8,\), which are no classes"),
    "ones": (torch.ones(8, CLASSES, dtype=torch.long), r"are int64 of \(8, 5\), which are no classes"),
    "too large": (Y + CLASSES, r"has the label \d, and the module returns 5 scores: labels are 0 to 4"),
}
USES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "evaluate": saq.evaluate,
    "finetune": lambda q, data: saq.finetune(q, data, epochs=1),
    "validation": lambda q, data: saq.finetune(q, [(X, Y)], epochs=1, validation=data),
    "analyze": lambda q, data: saq.analyze(q, data, ["sharpness"]),
    "search": lambda q, data: saq.search(build("hand_written"), "w4a4", data, searcher="sensitivity"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
@pytest.mark.parametrize("use", USES)
def test_labels_that_are_no_classes_are_refused(use: str, kind: str) -> None:
    labels, match = BAD_LABELS[kind]
    with pytest.raises(DataError, match=match) as caught:
        USES[use](quantized(), [(X, labels)])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", GOOD_LABELS)
def test_integers_of_any_width_are_labels(dtype: torch.dtype) -> None:
    q, other = quantized(), quantized()
    assert saq.evaluate(q, [(X, Y.to(dtype))]) == saq.evaluate(q, [(X, Y)])
    saq.finetune(q, [(X, Y.to(dtype))], epochs=1)
    saq.finetune(other, [(X, Y)], epochs=1)
    assert torch.equal(q(X), other(X))


def test_evaluate_refuses_shares_and_skips_unread_images() -> None:
    with pytest.raises(DataError, match=r"are float32 of \(8, 5\), which are no classes"):
        saq.evaluate(build("hand_written"), [(X, torch.rand(8, CLASSES))])
    unread = Y.clone()
    unread[:3] = -1
    score = saq.evaluate(build("hand_written"), [(X, unread)])
    assert (score.images, score.skipped) == (5, 3)


def test_unread_images_are_left_out_of_measurements() -> None:
    q, unread = quantized(), torch.cat([Y[:6], torch.tensor([-1, -1])])
    some, rest = [(X[:6], Y[:6])], [(X, unread), (X, torch.full_like(Y, -1))]
    assert saq.analyze(q, rest)["sharpness"].to_dict() == saq.analyze(q, some)["sharpness"].to_dict()
    one, other = (
        saq.search(build("hand_written"), "w4a4", data, example=X, searcher="sensitivity", samples=6)
        for data in (some, rest)
    )
    assert other.cost.bops <= one.budget.bops


# Modules that keep something, streams


class Keeping(HandWritten):
    """Keeps a tensor of its first forward pass, as modules with masks and grids do."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones_like(x[:1])
        return super().forward(x * self.kept)


def test_evaluated_module_trains_on_what_it_kept() -> None:
    net = Keeping()
    saq.evaluate(net, [(X, Y)])
    nn.functional.cross_entropy(net(X.requires_grad_()), Y).backward()
    X.requires_grad_(False)


def test_validation_leaves_nothing_untrainable() -> None:
    q = quantized(Keeping())
    q.kept = None  # type: ignore[assignment]
    saq.finetune(q, [(X, Y)], epochs=2, validation=[(X, Y)])


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


def test_finetune_takes_a_stream() -> None:
    one, other = quantized(), quantized()
    saq.finetune(one, DataLoader(Stream(), 4), epochs=2, validation=DataLoader(Stream(), 4))
    saq.finetune(other, list(zip(X.split(4), Y.split(4), strict=True)), epochs=2)
    assert torch.equal(one.eval()(X), other.eval()(X))


def test_search_splits_images_not_batches() -> None:
    singles = list(zip(X.split(1), Y.split(1), strict=True))
    found = saq.search(build("hand_written"), "w4a4", singles, searcher="sensitivity")
    assert found.cost.bops <= found.budget.bops


# Signatures


class Masked(HandWritten):
    """An optional second input."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


def test_optional_input_of_the_example_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.rand(8, 1, 16, 16)
    net, batches = Masked(), [(X, mask, Y)]
    q = quantized(net, example=(X, mask), calibration=batches, recalibrate_bn=False)
    before = q(X, mask)
    saq.calibrate(q, batches, recalibrate_bn=False)

    torch.testing.assert_close(q.eval()(X, mask), before)
    assert saq.evaluate(q, batches).images == 8
    saq.save(q, tmp_path / "net.safetensors")
    loaded = saq.load(tmp_path / "net.safetensors", model=Masked(), example=(X, mask))
    assert saq.evaluate(loaded, batches) == saq.evaluate(q, batches)


def test_tuple_and_list_of_inputs_mean_the_same() -> None:
    two = inputs_of("two_inputs")
    for example in (two, list(two), (*two, 1.0), [*two, 1.0]):
        assert saq.bops(build("two_inputs"), example=example) == saq.bops(build("two_inputs"), example=two)
    for example in ((X, Y), [X, Y], (X,), [X]):  # more than the forward takes: a batch with labels
        assert torch.equal(quantized(example=example)(X), quantized(example=X)(X))


class ByName(TwoInputs):
    """An input that is given by its name only."""

    def forward(self, image: Tensor, *, numbers: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(image, numbers)


def test_arguments_by_name_only_are_passed_by_name() -> None:
    torch.manual_seed(0)
    net, (image, numbers) = ByName(), inputs_of("two_inputs")
    batches: list[Any] = [
        (image, numbers, Y), ((image, numbers), Y), {"image": image, "numbers": numbers, "labels": Y}
    ]  # fmt: skip
    scores = [saq.evaluate(quantized(net, calibration=[batch]), [batch]) for batch in batches]
    assert scores[0] == scores[1] == scores[2]
    call = BatchReader(net, lambda batch: (batch["a"], batch["b"])).call({"a": image, "b": numbers})
    assert torch.equal(call.run(net), net(image, numbers=numbers))


def test_forward_of_the_object_counts() -> None:
    def forward(self: TwoInputs, image: Tensor) -> Tensor:
        return TwoInputs.forward(self, image, torch.zeros(len(image), 4))

    net = build("two_inputs")
    net.forward = MethodType(forward, net)  # type: ignore[method-assign]
    assert saq.evaluate(net, [(X, Y)]).images == 8

    other, plain = build("two_inputs"), build("two_inputs").forward
    other.forward = lambda *args, **kwargs: plain(*args, **kwargs)  # type: ignore[method-assign]
    assert saq.evaluate(other, [(*inputs_of("two_inputs"), Y)]).images == 8


class OfDictionary(HandWritten):
    """Takes one dictionary."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["photo"])


@pytest.mark.parametrize("form", ["inputs", "nested"])
def test_module_of_a_dictionary_is_saved_and_loaded(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example: Any = {"photo": X}
    options: dict[str, Any] = {"example": example, "inputs": lambda batch: (batch,)}
    if form == "nested":
        options = {"example": (example,)}
    q = quantized(OfDictionary(), **options)
    saq.save(q, tmp_path / "net.safetensors")
    loaded = saq.load(tmp_path / "net.safetensors", model=OfDictionary(), **options)
    assert torch.equal(loaded(example), q(example))


def test_torchscript_is_measured_but_not_quantized() -> None:
    net = torch.jit.script(small().eval())  # type: ignore[no-untyped-call]
    assert saq.evaluate(net, [(X, Y)]).images == 8
    with pytest.raises(UnsupportedModel, match="is a TorchScript module"):
        saq.quantize_model(net, 4, calibration=[X])
