"""The scripts in ``benchmarks/`` import the package as it is, and their page of results is what they make of it."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("peers/*.py")])


@pytest.fixture(autouse=True)
def own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import each other by name; afterwards these names are free for others."""
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name, module in list(sys.modules.items()):
        if FOLDER in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / name), run_name="imported")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_can_be_imported(path: Path) -> None:
    runpy.run_path(str(path), run_name="imported")


def test_step_time_prints_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["float", "qat_eager", "saq_norms_eager", "lsq_bf16"]
    asked = f"--model saq/resnet8s --batch-size 2 --rounds 1 --quick --json --variants {','.join(names)}"
    monkeypatch.setattr(sys, "argv", ["step_time.py", *asked.split()])
    script("step_time.py")["main"]()
    found = json.loads(capsys.readouterr().out)
    assert not found["errors"]
    assert all(found[name] > 0 for name in names)
    assert all(found["peak_mb"][name] > 0 for name in ("float", "qat_eager"))
    assert {"date", "cpu", "isa", "threads", "torch", "command", "side"} <= found.keys()


def test_every_named_variant_exists() -> None:
    steps = script("step_time.py")
    for name in (*steps["QUICK"], *steps["FULL"]):
        steps["variant_of"](name)
    with pytest.raises(ValueError, match="saq_norms_eagerly is no variant"):
        steps["variant_of"]("saq_norms_eagerly")


def test_results_page_is_current() -> None:
    assert script("results.py")["page"]() == (FOLDER / "RESULTS.md").read_text(encoding="utf-8")


def test_tables_of_the_documentation_are_current() -> None:
    tables = script("tables.py")
    texts = [path.read_text(encoding="utf-8") for path in tables["PAGES"]]
    assert [tables["page"](text) for text in texts] == texts
    assert all(sum(f"<!-- table {name} -->" in text for text in texts) == 1 for name in tables["TABLES"])


def test_row_of_readme_has_the_options_that_were_typed() -> None:
    typed = "saq quantize net --weights=w.pt --data d --method qat --no-distill --epochs 2 -q --run-dir r --mean 0,0,0"
    assert script("readme.py")["options"](typed.split()) == "--method qat --no-distill --epochs 2"


def test_collected_results_take_the_place_of_older_ones() -> None:
    collect = script("collect.py")
    about = dict.fromkeys(collect["ORIGIN"], "net") | {"budget": "w3a3"}
    costs = {"bops": 5, "budget_bops": 6, "cpu_seconds": 1.0}
    searches = [
        {"kind": "search", **about, **costs, "name": name, "bits": bits, "policy": {}, "seed": 0}
        for name, bits in (("uniform", "3 3"), ("swaps", "2 4"), ("error", "3 3"))
    ]
    run = {
        "kind": "train",
        "model": "net",
        "seed": 0,
        "method": "qat",
        "calibrated": 80.0,
        "loss": 0.5,
        "train_seconds": 1.0,
    }
    calibrated = [run | {"bits": bits, "stages": [], "epochs": 0, "top1": 80.0} for bits in ("3 3", "2 4")]
    trained = run | {"bits": "2 4", "stages": ["reconstructed"], "epochs": 0, "top1": 85.0}
    method = {
        "model": "net",
        "bits": "w2a2",
        "precision": "float32",
        "epochs": 6,
        "lr": 0.01,
        "name": "qat",
        "seed": 0,
    }
    sharp = method | {"eigenvalue": 75.0}
    found = collect["collected"]([*searches, *calibrated, trained, method, sharp])
    assert found["eigenvalues.jsonl"] == [sharp]
    assert [row["name"] for row in found["searches.jsonl"]] == ["uniform", "swaps", "error"]
    assert [(row["name"], row["top1"]) for row in found["trained.jsonl"]] == [("swaps", 85.0)]
    assert found["minimizers.jsonl"] == [method]
    assert all("policy" not in row for rows in found.values() for row in rows)
    other = method | {"model": "other"}
    new = [method | {"top1": 1.0}, method | {"seed": 1}]
    merged = collect["merge"]([method, other], new, collect["KEYS"]["minimizers.jsonl"])
    assert merged == [method | {"top1": 1.0}, method | {"seed": 1}, other]


def test_goals_with_kernels_are_relative_to_eager_float() -> None:
    seconds = {
        "float_eager": 1.0,
        "qat_eager": 1.3,
        "qat_kernels": 1.05,
        "float": 0.9,
        "qat": 0.99,
        "saq": 1.8,
    }
    ran_as = {
        "float_eager": "as written",
        "qat_eager": "as written",
        "qat_kernels": "with fused kernels",
        "float": "channels_last",
        "qat": "with fused kernels, channels_last",
        "saq": "channels_last",
    }
    modes = ["default", "eager", "kernels"]
    results = script("results.py")
    rows = results["goals"](
        {**seconds, "ran_as": ran_as, "peak_mb": {"float_eager": 100, "qat_kernels": 110}}, modes
    )
    assert rows[0][2:] == ["**1.10**", "1.30", "**1.05**"]
    assert rows[1][2:] == ["", "", ""]  # SAQ and QAT by default computed in different ways
    assert rows[-1][2:] == ["", "", "**1.10**"]
    assert results["cell"](seconds, "qat", "kernels") == "1.05 (1050 ms)"
