"""``saq models``: patterns, the stored catalogue compared with the libraries, and coverage."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saqcli.models import catalogue
from saqcli.models.load import build_architecture

FOLDER = Path(catalogue.__file__).parent
KEPT: dict[str, Any] = json.loads((FOLDER / "published.json").read_text())


def current(library: str) -> bool:
    return KEPT[library]["version"] in (None, catalogue.installed_version(library))


def names(pattern: str | None) -> list[str]:
    return [entry.name for entry in catalogue.find(pattern)]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("resnet18", ["timm/resnet18", "torchvision/resnet18"]),
        ("saq/*net20", ["saq/preresnet20", "saq/resnet20"]),
        ("torchvision/squeeze*", ["torchvision/squeezenet1_0", "torchvision/squeezenet1_1"]),
        ("resnet18.a?_in1k", ["timm/resnet18.a1_in1k", "timm/resnet18.a2_in1k", "timm/resnet18.a3_in1k"]),
        (
            "torchvision/resnet50.*",
            ["torchvision/resnet50.IMAGENET1K_V2", "torchvision/resnet50.IMAGENET1K_V1"],
        ),
        ("nothing-like-it", []),
    ],
)
def test_find_matches_patterns(pattern: str, found: list[str]) -> None:
    assert names(pattern) == found


def test_holds_classifiers_only() -> None:
    found = names(None)
    assert {name.partition("/")[0] for name in found} == {"timm", "torchvision", "saq"}
    assert not [name for name in found if "fasterrcnn" in name or "deeplab" in name or "raft" in name]


def test_input_size_is_that_of_the_tag() -> None:
    sizes = {entry.name: entry.input_size for entry in catalogue.find("resnet18.a[13]_in1k")}
    assert sizes == {"timm/resnet18.a1_in1k": (3, 224, 224), "timm/resnet18.a3_in1k": (3, 160, 160)}
    (large,) = catalogue.find("torchvision/vit_b_16.*swag_e2e*")
    assert large.input_size == (3, 384, 384)


@pytest.mark.parametrize("library", KEPT)
def test_stored_catalogue_matches_the_library(library: str) -> None:
    if not current(library):
        pytest.skip(f"another {library} is installed, which is asked itself")
    found = catalogue.read_library(library)
    assert found == KEPT[library]["networks"]
    assert list(found) == list(KEPT[library]["networks"])


def test_find_does_not_import_torch() -> None:
    if not all(map(current, KEPT)):
        pytest.skip("other libraries are installed, which are asked themselves")
    code = "import sys; from saqcli.models.catalogue import find; find('resnet*'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_library_version_is_queried(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(library: str) -> str:
        return "99.0" if library == "timm" else KEPT[library]["version"]

    brand_new = {
        "resnet18": KEPT["timm"]["networks"]["resnet18"],
        "new18": {"input_size": [3, 8, 8], "tags": {}},
    }
    monkeypatch.setattr(catalogue, "installed_version", newer)
    monkeypatch.setattr(catalogue, "read_library", {"timm": brand_new}.__getitem__)

    known, new = catalogue.find("timm/*")

    assert (known.name, known.parameters) == ("timm/resnet18", 11_689_512)
    assert new == catalogue.Entry("timm/new18", None, (3, 8, 8), (), None)


def test_coverage_is_read_per_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in ("catalogue.csv", "published.json"):
        (tmp_path / file).write_text((FOLDER / file).read_text())
    verdicts = {"resnet": "ok", "vgg": "SAQ does not perturb 2 layers, such as features.0"}
    with (tmp_path / "coverage.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["library", "family", "model", "verdict"])
        writer.writerows(("timm", family, "any", verdict) for family, verdict in verdicts.items())
    monkeypatch.setattr(catalogue, "files", lambda package: tmp_path)

    assert {entry.covered for entry in catalogue.find("timm/resnet18*")} == {True}
    assert {entry.covered for entry in catalogue.find("timm/vgg*")} == {False}
    assert {entry.covered for entry in catalogue.find("torchvision/vgg*")} == {None}


def test_coverage_lists_known_families() -> None:
    with (FOLDER / "catalogue.csv").open() as file:
        families = {(row["name"].partition("/")[0], row["family"]) for row in csv.DictReader(file)}
    with (FOLDER / "coverage.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["library", "family", "model", "verdict"]
    assert {(row["library"], row["family"]) for row in rows} <= families
    assert all(row["verdict"] for row in rows)


@pytest.mark.parametrize("name", ["timm/test_vit", "torchvision/squeezenet1_1", "saq/resnet20"])
def test_parameter_counts(name: str) -> None:
    classes = {"saq/resnet20": 10}.get(name, 1000)
    model = build_architecture({"name": name, "num_classes": classes, "in_chans": 3, "kwargs": {}})
    (entry,) = catalogue.find(name)
    assert entry.parameters == sum(parameter.numel() for parameter in model.parameters())
