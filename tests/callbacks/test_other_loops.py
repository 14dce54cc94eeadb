"""Two steps in the loops of Lightning, transformers and timm give the bits of a loop of one's own."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import saqcli as saq
from saqcli.callbacks import SAQLightningMixin, SAQTrainerMixin
from saqcli.errors import ConfigError
from saqcli.training.minimizers.base import Minimizer

Make = Callable[[nn.Module, torch.optim.Optimizer], Minimizer]
METHODS: dict[str, Make] = {
    "saq": lambda model, optimizer: saq.SAQ(model, optimizer, rho=0.5),
    "asaq": lambda model, optimizer: saq.ASAQ(model, optimizer, rho=0.5),
    "qat": saq.QAT,
    "saq, rho=0": lambda model, optimizer: saq.SAQ(model, optimizer, rho=0.0),
    "every other": lambda model, optimizer: saq.SAQ(model, optimizer, rho=0.5, interval=2, reuse=0.5),
}
STEPS = 2
each_method = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        scores: Tensor = self.head(F.relu(self.body(x)).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    torch.manual_seed(3)
    return saq.quantize_model(Net().eval(), "w3a4", calibration=[torch.randn(8, 1, 8, 8)])


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(6, 1, 8, 8), torch.randint(3, (6,))) for _ in range(STEPS)]


@pytest.fixture
def net(quantized: nn.Module) -> nn.Module:
    return copy.deepcopy(quantized).train()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def own_loop(
    quantized: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    method: str,
    *,
    clip_grad: float | None = None,
    half: bool = False,
) -> tuple[nn.Module, list[float]]:
    """The network after two steps of a plain loop, and the losses."""
    net = copy.deepcopy(quantized).train()
    minimizer = METHODS[method](net, sgd(net))
    losses = []
    for images, labels in batches:

        def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return F.cross_entropy(net(images), labels)

        losses.append(float(minimizer.step(loss, clip_grad=clip_grad)))
    return net, losses


def check_same(one: nn.Module, other: nn.Module, before: nn.Module) -> None:
    """All tensors are the same bits, and training has moved them."""
    expected, start = other.state_dict(), before.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())


def test_plain_loop_is_moved_by_the_ascent(
    quantized: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> None:
    """Control: the comparisons can fail, and a radius of 0 is plain training."""
    ascended, plain, none = (own_loop(quantized, batches, name)[0] for name in ("saq", "qat", "saq, rho=0"))

    check_same(none, plain, quantized)
    with pytest.raises(AssertionError):
        check_same(ascended, plain, quantized)


# Lightning


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning", reason='needs lightning: pip install "saq[lightning]"')


def lightning_fit(
    lightning: Any,
    folder: Path,
    net: nn.Module,
    batches: list[Any],
    method: str,
    resume: Path | None = None,
    log: bool = True,
    **options: Any,
) -> Any:
    """The module after an epoch of automatic optimization on these batches."""

    class Module(SAQLightningMixin, lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.net(images), labels)
            if log:
                self.log("loss", loss)
            return loss

        def configure_minimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Minimizer:
            return METHODS[method](model, optimizer)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

        def on_train_batch_end(self, *_: Any) -> None:
            self.losses += [float(self.trainer.callback_metrics["loss"])] if log else []

    module = Module()
    trainer_of(lightning, folder, **options).fit(module, loader(batches), ckpt_path=resume)
    return module


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def trainer_of(lightning: Any, folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1}
    return lightning.Trainer(**{**quiet, **defaults, "default_root_dir": folder, **options})


@pytest.fixture(autouse=True)
def no_advice() -> Iterator[None]:
    """The libraries' advice about workers and folders is not ours to follow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@each_method
def test_lightning_equals_own_loop(
    method: str, lightning: Any, quantized: nn.Module, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    module = lightning_fit(lightning, tmp_path, net, batches, method)

    expected, losses = own_loop(quantized, batches, method)
    check_same(net, expected, quantized)
    assert module.losses == losses  # logged once, at the unperturbed weights
    assert module.trainer.global_step == STEPS


@pytest.mark.parametrize(
    ("options", "same"),
    [({"gradient_clip_val": 0.05}, {"clip_grad": 0.05}), ({"precision": "bf16-mixed"}, {"half": True})],
    ids=["clipped", "bfloat16"],
)
def test_lightning_settings_take_part(
    options: dict[str, Any],
    same: dict[str, Any],
    lightning: Any,
    quantized: nn.Module,
    net: nn.Module,
    batches: list[Any],
    tmp_path: Path,
) -> None:
    lightning_fit(lightning, tmp_path, net, batches, "saq", **options)

    check_same(net, own_loop(quantized, batches, "saq", **same)[0], quantized)
    with pytest.raises(AssertionError):
        check_same(net, own_loop(quantized, batches, "saq")[0], quantized)


def test_lightning_manual_optimization_needs_no_mixin(
    lightning: Any, quantized: nn.Module, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = False

        def on_train_start(self) -> None:
            self.minimizer = METHODS["saq"](self.net, self.optimizers())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            return self.minimizer.step(lambda: F.cross_entropy(self.net(images), labels))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    trainer = trainer_of(lightning, tmp_path)
    trainer.fit(Module(), loader(batches))

    check_same(net, own_loop(quantized, batches, "saq")[0], quantized)
    assert trainer.global_step == STEPS


def test_lightning_checkpoint_holds_the_interval(
    lightning: Any, quantized: nn.Module, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    module = lightning_fit(lightning, tmp_path, net, batches[:1], "every other")
    module.trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = copy.deepcopy(quantized).train()
    resumed = {"resume": tmp_path / "one.ckpt", "max_epochs": 2}
    lightning_fit(lightning, tmp_path, again, batches[1:], "every other", **resumed)

    check_same(again, own_loop(quantized, batches, "every other")[0], quantized)


def test_lightning_refuses_accumulation(
    lightning: Any, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="accumulate_grad_batches=2 has no sharpness-aware step"):
        lightning_fit(lightning, tmp_path, net, batches, "saq", accumulate_grad_batches=2)


def test_lightning_refuses_a_step_without_a_loss(
    lightning: Any, net: nn.Module, batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "cross_entropy", lambda scores, labels: None)
    with pytest.raises(ConfigError, match="training_step returned no loss"):
        lightning_fit(lightning, tmp_path, net, batches, "saq", log=False)


def test_lightning_refuses_manual_optimization_with_mixin(
    lightning: Any, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    class Module(SAQLightningMixin, lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            images, labels = batch
            self.manual_backward(F.cross_entropy(self.net(images), labels))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    with pytest.raises(ConfigError, match="manual optimization needs no mixin"):
        trainer_of(lightning, tmp_path).fit(Module(), loader(batches))


def test_wrong_order_of_bases_is_refused(lightning: Any) -> None:
    with pytest.raises(ConfigError, match="name SAQLightningMixin first among its bases"):
        type("Net", (lightning.LightningModule, SAQLightningMixin), {})
    base = type("Trainer", (), {"training_step": lambda self: None})
    with pytest.raises(ConfigError, match="name SAQTrainerMixin first among its bases"):
        type("Mine", (base, SAQTrainerMixin), {})


# transformers


@pytest.fixture
def transformers() -> Any:
    reason = 'needs transformers and accelerate: pip install "saq[transformers]"'
    pytest.importorskip("accelerate", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def hugging_face_fit(
    transformers: Any, folder: Path, net: nn.Module, batches: list[Any], method: str, **options: Any
) -> list[float]:
    """The losses of two steps."""
    losses: list[float] = []

    class Trainer(SAQTrainerMixin, transformers.Trainer):  # type: ignore[misc, name-defined]
        def create_minimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Minimizer:
            return METHODS[method](model, optimizer)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(float(loss := super().training_step(*args, **kwargs)))
            return loss

        def get_train_dataloader(self) -> DataLoader[Any]:
            images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
            rows = TensorDataset(images, labels)

            def collate(rows: list[Any]) -> dict[str, Tensor]:
                return {
                    "x": torch.stack([row[0] for row in rows]),
                    "labels": torch.stack([row[1] for row in rows]),
                }

            return DataLoader(rows, batch_size=len(batches[0][1]), collate_fn=collate)

    given = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none"}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, **{**given, **quiet, **options}
    )
    optimizer = sgd(net)
    Trainer(
        model=net,
        args=arguments,
        train_dataset=[0] * 12,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        compute_loss_func=lambda scores, labels, num_items_in_batch=None: F.cross_entropy(scores, labels),
    ).train()
    return losses


@each_method
def test_hugging_face_equals_own_loop(
    method: str, transformers: Any, quantized: nn.Module, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    losses = hugging_face_fit(transformers, tmp_path, net, batches, method)

    expected, known = own_loop(quantized, batches, method)
    check_same(net, expected, quantized)
    assert losses == known


def test_hugging_face_clips_the_second_pass(
    transformers: Any, quantized: nn.Module, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    hugging_face_fit(transformers, tmp_path, net, batches, "saq", max_grad_norm=0.05)

    check_same(net, own_loop(quantized, batches, "saq", clip_grad=0.05)[0], quantized)


def test_hugging_face_refuses_accumulation(
    transformers: Any, net: nn.Module, batches: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=2 has no sharpness-aware step"):
        hugging_face_fit(transformers, tmp_path, net, batches, "saq", gradient_accumulation_steps=2)


# timm


def test_timm_task_trains_a_quantized_module(
    quantized: nn.Module, net: nn.Module, batches: list[Any]
) -> None:
    """The steps of timm's train.py, which are plain quantization-aware training."""
    task_module = pytest.importorskip("timm.task", reason="needs a timm with timm.task")
    task = task_module.ClassificationTask(net, nn.CrossEntropyLoss())
    optimizer = sgd(net)
    task.train()
    for images, labels in batches:
        loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    check_same(net, own_loop(quantized, batches, "qat")[0], quantized)


@each_method
def test_timm_task_takes_a_minimizer(
    method: str, quantized: nn.Module, net: nn.Module, batches: list[Any]
) -> None:
    task_module = pytest.importorskip("timm.task", reason="needs a timm with timm.task")
    task = task_module.ClassificationTask(net, nn.CrossEntropyLoss())
    minimizer = METHODS[method](task, sgd(net))
    task.train()
    for images, labels in batches:
        minimizer.step(lambda images=images, labels=labels: task(images, labels)["loss"])

    check_same(net, own_loop(quantized, batches, method)[0], quantized)
