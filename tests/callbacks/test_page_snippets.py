"""The code of docs/python.md for the loops of other libraries trains as it stands, given a network and images."""

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import saqcli as saq

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
STEPS = 2


def snippets(head: str) -> list[str]:
    section = PAGE.read_text(encoding="utf-8").partition(f"\n### {head}\n")[2].partition("\n### ")[0]
    return re.findall(r"^```py\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def no_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def q() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3))
    return saq.quantize_model(net.eval(), "w3a4", calibration=[torch.randn(8, 1, 8, 8)]).train()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(6, 1, 8, 8), torch.randint(3, (6,))) for _ in range(STEPS)]


@pytest.fixture
def expected(q: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors after two steps of a loop of one's own."""
    net = copy.deepcopy(q)
    minimizer = saq.SAQ(net, torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9), rho=0.3)
    for images, labels in batches:
        minimizer.step(lambda images=images, labels=labels: F.cross_entropy(net(images), labels))
    return net.state_dict()


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning", reason='needs lightning: pip install "saq[lightning]"')


def fit(lightning: Any, module: Any, batches: list[Any], folder: Path) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, enable_checkpointing=False, default_root_dir=folder, **quiet
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


def check_moved(q: nn.Module, before: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in q.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())


def test_lightning_module_trains(
    lightning: Any, q: nn.Module, batches: list[Any], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    before, names = copy.deepcopy(q.state_dict()), {"torch": torch, "F": F, "saq": saq}
    exec(snippets("Lightning")[0], names)

    fit(lightning, names["Module"](q), batches, tmp_path)  # type: ignore[operator]

    check_moved(q, before, expected)


def test_manual_lightning_module_trains(
    lightning: Any, q: nn.Module, batches: list[Any], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    before, names = copy.deepcopy(q.state_dict()), {"F": F, "saq": saq, "lightning": lightning}
    exec(snippets("Lightning")[1], names)
    module = names["Module"]()
    module.q = q
    module.configure_optimizers = lambda: torch.optim.SGD(q.parameters(), lr=0.005, momentum=0.9)

    fit(lightning, module, batches, tmp_path)

    check_moved(q, before, expected)


def test_hugging_face_trainer_trains(q: nn.Module, batches: list[Any], tmp_path: Path) -> None:
    reason = 'needs transformers and accelerate: pip install "saq[transformers]"'
    pytest.importorskip("accelerate", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    data = [row for images, labels in batches for row in zip(images, labels, strict=True)]
    quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "report_to": "none"}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, use_cpu=True, per_device_train_batch_size=6, **quiet
    )

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return {
            "input": torch.stack([row[0] for row in rows]),
            "labels": torch.stack([row[1] for row in rows]),
        }

    before, passes = copy.deepcopy(q.state_dict()), []
    q.register_forward_hook(lambda *_: passes.append(1))
    (code,) = snippets("Hugging Face Trainer")

    exec(code, {"F": F, "saq": saq, "q": q, "args": args, "data": data, "collate": collate})

    assert len(passes) == 2 * STEPS
    assert any(not torch.equal(value, before[name]) for name, value in q.state_dict().items())
