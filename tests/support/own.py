"""A package of the user's own in a folder, with a network that no library has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from saqcli.models import own

NETS = '''
"""Networks for 16 x 16 images, with functional operations and a residual."""
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=10, in_chans=3, width=8):
        super().__init__()
        self.fc = nn.Linear(width, num_classes)
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(x + self.conv2(x)), 2)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Fixed(Net):
    def __init__(self):
        super().__init__(6)


def build(num_classes=10, in_chans=3, width=8):
    from shapes import widths  # a neighbour that is imported late

    return Net(num_classes, in_chans, widths[width])


def described(num_classes=10):
    net = Net(num_classes)
    net.pretrained_cfg = {"input_size": (3, 24, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "crop_pct": 0.9}
    return net


def demanding(width, num_classes=10):
    return Net(num_classes, width=width)


def loading(num_classes=10, pretrained=False):
    net = Net(num_classes)
    with torch.no_grad():
        net.fc.bias.fill_(1.0 if pretrained else 0.0)
    return net


def deserting():
    raise KeyError("no such width")


def counting():
    return 7


class Strange(Net):
    def forward(self, x):
        raise LookupError("lost")


module = Net(4)
constant = 3
'''


def write_package(folder: Path) -> None:
    """Write ``mynets.nets``, ``mynets.broken``, ``mynets.incomplete``, ``models`` and ``shapes`` into ``folder``."""
    package = folder / "mynets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(NETS)
    (package / "broken.py").write_text("import torch\n\nwidth = {}['width']\n")
    (package / "incomplete.py").write_text("import no_such_library\n")
    (package / "syntax.py").write_text("def build(:\n")
    (folder / "models.py").write_text("from mynets.nets import build\n")
    (folder / "shapes.py").write_text("widths = {4: 4, 8: 8}\n")
    (folder / "evil.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\n\ndef build(): ...\n")


@pytest.fixture
def mynets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the package; its modules are forgotten afterwards."""
    import sys

    write_package(tmp_path)
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("mynets", "models", "shapes", "evil"):
            del sys.modules[name]


@pytest.fixture
def no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any import of a network of one's own fails the test."""

    def fail(name: str, path: str) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(own, "_import", fail)
