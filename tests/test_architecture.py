"""The shape of the package: which way imports point, what a light import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saqcli

ROOT = Path(saqcli.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What lies below each part, and so may be imported there beside the part itself.
# The base files hold no logic of any part.
BASE = {"errors", "config", "units", "strict", "progress", "ranks", "finite", "_version"}
ALLOWED = {
    "cli": {"workflows", "algorithms", "quant", "io"},
    "workflows": {"algorithms", "quant", "io"},
    "algorithms": {"quant"},
    "quant": set(),
    "io": set(),
}
# Plugins of one family do not know each other; these files are what they share.
FAMILIES = {
    "algorithms/minimizers": {"batches", "look_ahead", "passes", "sharpness_aware"},
    "algorithms/searchers": {
        "problem",
        "knapsack",
        "separable",
        "sampling",
        "supernet",
        "scoring",
        "controller",
        "reinforce",
        "alternation",
        "sharp_cost",
        "cosine",
        "batch_sums",
        "descent",
        "descent_settings",
        "mixture",
    },
    "algorithms/instruments": {"base", "curvature", "inputs"},
    "algorithms/exporters": {"facts", "onnx_metadata", "digest", "damage", "envelope"},
    "quant/quantizers": {"base", "learned_step", "offset_search", "tanh_weight"},
}


def module_of(path: Path) -> str:
    parts = ["saqcli", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything of ours that a file imports, inside functions too."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "saqcli"]


def part_of(name: str) -> str:
    """``saqcli.quant.bits.Bits`` is of ``quant``; a public name of the package is of ``saqcli``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in {*ALLOWED, *BASE} else "saqcli"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_file = pytest.mark.parametrize("path", FILES, ids=relative)


@each_file
def test_imports_point_down_only(path: Path) -> None:
    own = part_of(module_of(path))
    if path.name == "__main__.py":
        allowed = {"cli"}
    elif own == "saqcli":
        allowed = {"_version"}
    else:
        allowed = {own, *BASE, *ALLOWED.get(own, set())}
    if own == "cli":
        allowed.add("saqcli")  # the version
    wrong = [f"line {line}: {name}" for line, name in imports(path) if part_of(name) not in allowed]
    assert not wrong


def test_base_files_import_base_files_only() -> None:
    for name in sorted(BASE):
        for line, target in imports(ROOT / f"{name}.py"):
            assert part_of(target) in BASE, f"{name}.py line {line}: {target}"


@pytest.mark.parametrize("family", FAMILIES)
def test_plugins_of_a_family_do_not_import_each_other(family: str) -> None:
    shared = FAMILIES[family]
    prefix = "saqcli." + family.replace("/", ".")
    plugins = [p for p in sorted((ROOT / family).glob("*.py")) if p.stem not in {"__init__", *shared}]
    assert plugins
    siblings = {f"{prefix}.{p.stem}" for p in plugins}
    for path in plugins:
        for line, name in imports(path):
            module = ".".join(name.split(".")[: prefix.count(".") + 2])
            assert module == module_of(path) or module not in siblings, f"{path.name} line {line}: {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_shares_exists(family: str) -> None:
    for name in FAMILIES[family]:
        assert (ROOT / family / f"{name}.py").is_file()


@each_file
def test_every_module_says_what_it_is(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert text.strip()


@each_file
def test_nothing_is_imported_by_star(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]


@pytest.mark.parametrize("name", saqcli.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(saqcli, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        saqcli.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", ["saqcli", "saqcli.cli", "saqcli.errors", "saqcli.config"])
def test_a_light_import_stays_light(module: str) -> None:
    heavy = ("torch", "torchvision", "timm", "numpy", "scipy", "sklearn", "onnx", "onnxruntime", "PIL")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_the_walk_sees_imports_inside_functions_and_relative_ones(tmp_path: Path) -> None:
    """The tests above can fail: what they look for is found."""
    path = ROOT / "quant" / "layers.py"
    assert "saqcli.quant.attention.special_mixin" in {name for _, name in imports(path)}
    assert part_of("saqcli.pipelines.quantize") not in {"algorithms", *BASE, *ALLOWED["algorithms"]}


def test_what_takes_time_is_measured_by_a_clock_that_only_goes_forward() -> None:
    """The time of day, which may jump, is told to people and decides nothing: two files write it down."""
    wall = {"time.time", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow", "datetime.today"}
    found = {
        f"{relative(path)} {name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (name := ast.unparse(node.func)) in wall | {"date.today", "time.time_ns"}
    }
    assert found == {"io/locks.py datetime.now", "io/runs.py datetime.now"}
