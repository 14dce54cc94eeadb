"""What the command line computed before is what it computes now: a guard for changes that are to move code only.

    by default    the runs of ``golden_runs.py``: of what they record, that which no processor changes (bits, costs,
                  files, names and shapes of tensors, operators, keys of JSON) is compared with ``goldens.json``; and
                  the options of every command with ``options.json``
    slow          the same script runs at an earlier commit too, on this machine, and everything must be equal, hashes
                  of weights, graphs and policies included; the commit is SAQ_GOLDEN_REF, or else where this branch
                  left ``origin/main``, or else the one before

After a change of behaviour that is meant, ``python -m tests.end_to_end.test_goldens`` writes both files again.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from saqcli.cli import app

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPT, GOLDENS, OPTIONS = HERE / "golden_runs.py", HERE / "goldens.json", HERE / "options.json"

CLOSED = (
    "uniform",
    "error",
    "hawq",
    "sensitivity",
)  # searchers that no rounding turns; quantize takes the second
DECIDED = ("quantize-", *(f"search-{name}" for name in CLOSED), "rerun", "profile")
FIGURES = (
    *("bops", "budget_bops", "budget_bytes", "float_bops", "floor_bops", "ceiling_bops", "size_bytes"),
    *(
        "float_size_bytes",
        "floor_size_bytes",
        "ceiling_size_bytes",
        "epochs",
        "images",
        "policy",
        "identical",
    ),
)
DEPTH = 3  # of the keys in JSON that are compared


# Runs a script with the package of a tree, and reads the operators of ONNX once instead of in every export.
START = """
import pathlib, runpy, sys

tree, root, *sys.argv = sys.argv[1:]
import saqcli
assert pathlib.Path(saqcli.__file__).is_relative_to(tree), saqcli.__file__
import onnxscript, torch.onnx._internal.exporter._core
sys.path.append(root)
from tests.support.operators import read_once
assert read_once()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_goldens(tree: Path, folder: Path) -> Any:
    """What the script records with the package of ``tree``, in a process of its own."""
    out = folder / "records.json"
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START, *map(str, (tree, ROOT, SCRIPT, out))]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def portable(records: dict[str, Any]) -> dict[str, Any]:
    """The part of the records that is the same on every processor."""
    found: dict[str, Any] = {}
    for case, record in records.items():
        kept: dict[str, Any] = {"keys": sorted(keys(record["json"]))}
        if "files" in record:
            kept["files"] = record["files"]
        if case.startswith(DECIDED):
            kept["figures"] = {key: record["json"][key] for key in FIGURES if key in record["json"]}
            kept |= {
                name: contents(part)
                for name, part in record.items()
                if name.endswith(("onnx", "safetensors"))
            }
        if "operators" in record:
            kept["onnx"] = contents(record)
        found[case] = kept
    return found


def contents(file: dict[str, Any]) -> dict[str, Any]:
    """What a file is made of, numbers aside."""
    return {key: file[key] for key in ("operators", "opsets", "initializers", "tensors") if key in file}


def keys(value: Any, depth: int = DEPTH) -> Iterator[str]:
    """Keys of an object and of those within it, as ``outer.inner``; of a list, of all that it holds.

    Those of a policy are layers.
    """
    if isinstance(value, list):
        yield from {key for each in value for key in keys(each, depth)}
    elif isinstance(value, dict) and depth:
        for name, each in value.items():
            yield name
            if name != "policy":
                yield from {f"{name}.{key}" for key in keys(each, depth - 1)}


def options() -> dict[str, dict[str, str]]:
    """By command, every argument and every spelling of every option that its help shows, and how it is given."""
    return {name: spellings(command, hidden=False) for name, command in commands().items()}


def commands() -> dict[str, Any]:
    group: Any = get_command(app)
    return {"saq": group, **{f"saq {name}": command for name, command in group.commands.items()}}


def spellings(command: Any, *, hidden: bool) -> dict[str, str]:
    found = {}
    for parameter in command.params:
        if getattr(parameter, "hidden", False) and not hidden:
            continue
        positional = parameter.param_type_name == "argument"
        names = [parameter.metavar] if positional else [*parameter.opts, *parameter.secondary_opts]
        words = ["argument" if positional else "flag" if parameter.is_flag else "value"]
        words += ["required"] * parameter.required + ["repeats"] * (
            parameter.multiple if not positional else 0
        )
        found |= dict.fromkeys(names, ", ".join(words))
    return {name: how for name, how in found.items() if not name.endswith("-completion")}  # Typer's own


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Every place where they are not equal, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = [f"{place}/{key}: new" for key in now if key not in before]
        for key, value in before.items():
            if key in now:
                lines += differences(value, now[key], f"{place}/{key}")
            else:
                lines.append(f"{place}/{key}: gone")
        return lines
    if isinstance(before, list) and isinstance(now, list) and before != now:
        if len(before) == len(now):
            numbered = enumerate(zip(before, now, strict=True))
            return [line for i, pair in numbered for line in differences(*pair, f"{place}[{i}]")]
        gone, new = (
            [each for each in one if each not in other] for one, other in ((before, now), (now, before))
        )
        return [f"{place}: gone {gone}, new {new}, {len(before)} before and {len(now)} now"]
    return [] if before == now else [f"{place}: {before} before, {now} now"]


def check_same(before: Any, now: Any) -> None:
    found = differences(before, now)
    more = f"\n... and {len(found) - 40} more" if len(found) > 40 else ""
    assert not found, "\n" + "\n".join(found[:40]) + more


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_goldens(ROOT, tmp_path_factory.mktemp("goldens"))


def test_commands_give_the_recorded_results(records: Any) -> None:
    check_same(json.loads(GOLDENS.read_text(encoding="utf-8")), portable(records))


def test_resumed_run_ends_as_the_whole_one(records: Any) -> None:
    whole, resumed = records["quantize-saq"], records["quantize-resumed"]
    for name in ("policy.json", "metrics.jsonl", "artifacts/model.safetensors"):
        check_same(whole[name], resumed[name])


def test_export_writes_the_graph_of_the_run(records: Any) -> None:
    assert records["export-qdq"]["sha256"] == records["quantize-saq"]["artifacts/model.onnx"]["sha256"]


def test_rerun_gives_the_policy_of_the_search(records: Any) -> None:
    assert records["rerun"]["json"]["identical"]
    check_same(records["search-error"]["policy.json"], records["rerun"]["policy.json"])


def test_commands_accept_the_recorded_options() -> None:
    """What is new must be recorded too, unless help hides it; what was recorded may be hidden, and still accepted."""
    recorded, shown = json.loads(OPTIONS.read_text(encoding="utf-8")), options()
    accepted = {name: spellings(command, hidden=True) for name, command in commands().items()}
    now = {
        name: {
            key: how
            for key, how in accepted[name].items()
            if key in shown[name] or key in recorded.get(name, {})
        }
        for name in accepted
    }
    check_same(recorded, now)


def git(*arguments: str) -> bytes | None:
    """What git prints; None where there is no git, no history, or no such commit."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def reference() -> str | None:
    """The commit to compare with."""
    if asked := os.environ.get("SAQ_GOLDEN_REF"):
        return asked
    found = git("merge-base", "HEAD", "origin/main") or git("rev-parse", "--verify", "HEAD~1")
    return found.decode().strip() if found else None


@pytest.mark.slow  # the runs take a minute at each commit
@pytest.mark.timeout(1200)
def test_commands_give_an_earlier_commit_s_bits(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    commit = reference()
    archive = commit and git("archive", commit, "saqcli", "pyproject.toml")
    if not archive:
        if os.environ.get("SAQ_GOLDEN_REF"):
            pytest.fail(f"git has no commit {commit}")
        pytest.skip(f"needs the git history up to {commit or 'the commit before'}")
    tree = tmp_path / "before"
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(tree, filter="data")
    check_same(run_goldens(tree, tmp_path), request.getfixturevalue("records"))


def write() -> None:
    """Record what the commands do now."""
    with tempfile.TemporaryDirectory() as folder:
        found = portable(run_goldens(ROOT, Path(folder)))
    for path, value in ((GOLDENS, found), (OPTIONS, options())):
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
