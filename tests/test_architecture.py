"""The structure of the package: import directions, and what light imports load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saqcli

ROOT = Path(saqcli.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The rooms from top to bottom: a file imports from its own room and from rooms below it. Base files are below all.
ROOMS = (
    "cli",
    "pipelines",
    "callbacks",
    "api",
    "report",
    "verify",
    "analysis",
    "searchers",
    "reconstruction",
    "training",
    "export",
    "data",
    "runs",
    "models",
    "quant",
    "tasks",
)
BASE = {
    "_version",
    "allocator",
    "config",
    "distributed",
    "errors",
    "finite",
    "machine",
    "option",
    "plugins",
    "process_group",
    "progress",
    "random_state",
    "serialization",
    "target",
    "units",
}
MOST_IMPORTS = 20  # of ours in one file
MOST_FILES = 20  # in one folder
# Plugins of a family do not import each other; these files are shared.
FAMILIES = {
    "training/minimizers": {"base", "reference", "sharpness_aware"},
    "searchers": {
        *("problem", "knapsack", "separable", "divergences", "fit", "supernet", "controller", "mixture"),
        "uniforms",
    },
    "analysis": {"base"},
    "export": {
        *("model_metadata", "onnx_helpers", "operators", "style", "tracing", "containers", "integer_kernels"),
        *("exact_form", "exact_sums", "integers", "ordered", "restore", "safetensors"),
    },
    "quant/quantizers": {"base", "ranges"},
    "runs/trackers": {"base"},
}


def module_of(path: Path) -> str:
    parts = ["saqcli", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything of ours that a file imports, including inside functions."""
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


def room_of(name: str) -> str:
    """``saqcli.quant.bits.LayerBits`` is in ``quant``, ``saqcli.errors.SaqError`` in ``base``."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in ROOMS else "base" if part in BASE else "saqcli"


def target_of(name: str) -> str:
    """The module loaded by an import of ``name``."""
    return name if name in MODULES else name.rpartition(".")[0]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MODULES = {module_of(path): path for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=relative)


def graph() -> dict[str, set[str]]:
    """Every module of ours and its imports of ours."""
    return {
        module: {target_of(name) for _, name in imports(path)} - {module} for module, path in MODULES.items()
    }


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules in import cycles: those left after repeatedly removing leaves."""
    left = dict(edges)
    while True:
        imported = set().union(*left.values()) if left else set()
        ends = {m for m in left if not left[m] & left.keys() or m not in imported}
        if not ends:
            return [sorted(left)] if left else []
        left = {m: targets for m, targets in left.items() if m not in ends}


def test_imports_form_no_cycle() -> None:
    assert cycles(graph()) == []


def test_cycles_are_detected() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


@each_file
def test_imports_point_down_only(path: Path) -> None:
    own = room_of(module_of(path))
    if path.name == "__main__.py":
        allowed = {"cli"}
    elif own == "saqcli":
        allowed = {"base"}
    else:
        allowed = {"base"} if own == "base" else {*ROOMS[ROOMS.index(own) :], "base"}
    if own == "cli":
        allowed.add("saqcli")  # the version
    wrong = [f"line {line}: {name}" for line, name in imports(path) if room_of(name) not in allowed]
    assert not wrong


@each_file
def test_file_has_few_internal_imports(path: Path) -> None:
    assert len(graph_of(path)) <= MOST_IMPORTS


def graph_of(path: Path) -> set[str]:
    return {target_of(name) for _, name in imports(path)} - {"saqcli"}


def test_folder_holds_few_files() -> None:
    for folder in {path.parent for path in FILES}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


@each_file
def test_no_flags_below_the_cli(path: Path) -> None:
    if room_of(module_of(path)) == "cli":
        return
    flags = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and flags.search(node.value)
    ]
    assert not found


@pytest.mark.parametrize("family", FAMILIES)
def test_plugins_do_not_import_each_other(family: str) -> None:
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
def test_shared_family_modules_exist(family: str) -> None:
    for name in FAMILIES[family]:
        assert (ROOT / family / f"{name}.py").is_file()


@each_file
def test_every_module_has_a_docstring(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert text.strip()


@each_file
def test_no_star_imports(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]


@pytest.mark.parametrize("name", saqcli.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(saqcli, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        saqcli.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", ["saqcli", "saqcli.cli", "saqcli.errors", "saqcli.config"])
def test_light_imports_stay_light(module: str) -> None:
    heavy = ("torch", "torchvision", "timm", "numpy", "scipy", "sklearn", "onnx", "onnxruntime", "PIL")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_version_and_root_help_load_no_settings() -> None:
    code = "import sys, saqcli.cli; sys.exit('pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_import_scan_sees_local_imports(tmp_path: Path) -> None:
    """Control for the tests above."""
    path = ROOT / "quant" / "wrapping.py"
    assert "saqcli.quant.attention.custom_mixin" in {name for _, name in imports(path)}
    assert "saqcli.quant.attention" in graph()["saqcli.quant.wrapping"]
    assert room_of("saqcli.pipelines.quantize") == "pipelines"


def test_durations_use_a_monotonic_clock() -> None:
    """The wall clock, which may jump, is only displayed: two files write it down, one shows an age."""
    wall = {"time.time", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow", "datetime.today"}
    found = {
        f"{relative(path)} {name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (name := ast.unparse(node.func)) in wall | {"date.today", "time.time_ns"}
    }
    assert found == {
        *("runs/locks.py datetime.now", "runs/directory.py datetime.now"),
        "runs/summary.py time.time",
    }
