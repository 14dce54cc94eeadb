"""What a command is pointed at: a run, a file of a model, or a model's name; every command reads it alike."""

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saqcli.config import ModelSection
from saqcli.data.folders import VAL_FOLDERS
from saqcli.errors import ConfigError, RunDirectoryError, UnknownModel
from saqcli.models.libraries import ZOOS
from saqcli.models.load import check_model_name
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import named_path, printable

Kind = Literal["run", "safetensors", "onnx", "model"]
MODEL_FILES: dict[str, Kind] = {".safetensors": "safetensors", ".onnx": "onnx"}
FLOAT_WEIGHTS = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
OTHER_FILES = (".json", ".jsonl", ".md", ".toml", ".csv", ".png", ".svg", ".html", ".txt")
CALLED = {
    "run": "a run directory",
    "safetensors": "a .safetensors file",
    "onnx": "an .onnx file",
    "model": "a model name",
}
QUANTIZED: tuple[Kind, ...] = ("run", "safetensors")
ANALYZED: tuple[Kind, ...] = (*QUANTIZED, "model")
EVALUATED: tuple[Kind, ...] = (*QUANTIZED, "onnx", "model")
NEAR = 3  # names that a message lists


@dataclass(frozen=True)
class Target:
    """Something to work on.

    Attributes:
        text: as it was named.
        kind: what it is.
        path: of the run directory or file; None of a model's name.
    """

    text: str
    kind: Kind
    path: Path | None = None

    @property
    def run(self) -> RunDirectory | None:
        """The run directory, where it is one."""
        return RunDirectory.open(self.path) if self.kind == "run" and self.path else None


def find_target(text: str, accepts: Sequence[Kind], called: str = "TARGET") -> Target:
    """What ``text`` names; nothing is loaded, and of a run nothing is read.

    Args:
        text: a path, whose ``~`` is the home folder, or a model's name.
        accepts: what the command can work on.
        called: what a message calls the argument.

    Raises:
        ConfigError: nothing of that name, or something that the command cannot work on.
        RunDirectoryError: a folder that is not a run.
        UnknownModel: no model of that name, nor anything else.
    """
    wanted = " or ".join(
        filter(None, (", ".join(CALLED[kind] for kind in accepts[:-1]), CALLED[accepts[-1]]))
    )
    if not text.strip():
        raise ConfigError(f"no {called} was named: give {wanted}")
    path = named_path(text)
    if path.is_dir():
        target = _folder(text, path, accepts)
    elif path.suffix in MODEL_FILES:
        target = Target(text, MODEL_FILES[path.suffix], path)
        if target.kind in accepts and not path.is_file():
            raise ConfigError(f"there is no file {path}{_near_runs(path)}")
    elif path.is_file():
        raise ConfigError(_no_model(path, wanted))
    elif is_path(text):
        raise ConfigError(f"there is no run directory or file {printable(text, 200)}{_near_runs(path)}")
    else:
        _check_name(text, path, accepts)
        target = Target(text, "model")
    if target.kind not in accepts:
        raise ConfigError(_cannot(target, called, wanted))
    return target


def is_path(text: str) -> bool:
    """Whether ``text`` can only mean a path: names of models have neither such a beginning nor such an end."""
    head, slash, _ = text.partition("/")
    library = head.lower() in ZOOS or ":" in head
    endings = (*MODEL_FILES, *FLOAT_WEIGHTS, *OTHER_FILES)
    return (
        text.startswith((".", "/", "~"))
        or text.endswith(("/", *endings))
        or "\\" in text
        or (bool(slash) and not library)
    )


def check_no_model_options(target: str, section: ModelSection) -> None:
    """A file that describes itself cannot be told otherwise."""
    plain = ModelSection(name=section.name).model_dump()
    given = [name.replace("_", "-") for name, value in section.model_dump().items() if value != plain[name]]
    if given:
        raise ConfigError(f"{target} brings its own network and preprocessing: remove --{', --'.join(given)}")


def check_not_run(name: str) -> None:
    """Refuse a run directory in the place of a model's name.

    Raises:
        ConfigError: it is one; says what takes it.
    """
    path = named_path(name)
    if (path / "manifest.json").is_file():
        run = RunDirectory.open(path)
        step = run.how_to_quantize() if run.policy_path.is_file() else run.next_step()
        raise ConfigError(f"{name} is a run of `saq {run.verb}`, not a model: {step}")


def model_file(run: RunDirectory) -> Path:
    """The safetensors file of a run.

    Raises:
        RunDirectoryError: the run is one of another command, or has not got that far; says what to do.
    """
    manifest = run.manifest()
    if manifest.verb != "quantize":
        state = "" if manifest.status == "finished" else f"; it {run.standing()}"
        raise RunDirectoryError(
            f"{run.path} is a run of `saq {manifest.verb}`, which holds bits and no model{state}: {run.next_step()}"
        )
    if not run.safetensors_path.is_file() or manifest.status == "clearing":
        raise RunDirectoryError(f"{run.path} holds no model: it {run.standing()}, {run.next_step()}")
    return run.safetensors_path


def named_file(target: Target, section: ModelSection) -> Path | None:
    """The file that ``target`` stands for: itself, the model of a run directory, or None for a model's name.

    Raises:
        SaqError: a run without a model, or options that a file does not take.
    """
    if target.kind == "model":
        return None
    check_no_model_options(target.text, section)
    run = target.run
    return target.path if run is None else model_file(run)


def policy_file(text: str) -> Path:
    """The file of bits that ``text`` names: itself, or that of a run.

    Raises:
        ConfigError: a folder that is not a run.
        RunDirectoryError: a run that has none yet.
    """
    path = named_path(text)
    if not path.is_dir():
        return path
    if not (path / "manifest.json").is_file():
        raise ConfigError(f"`quantization.policy`: {_not_a_run(path, files=False)}")
    run = RunDirectory.open(path)
    if not run.policy_path.is_file():
        raise RunDirectoryError(
            f"`quantization.policy={path}` holds no policy.json: it {run.standing()}, {run.next_step()}"
        )
    return run.policy_path


def _folder(text: str, path: Path, accepts: Sequence[Kind]) -> Target:
    """A run directory; or a model of the same name as a folder that is none."""
    if (path / "manifest.json").is_file():
        return Target(text, "run", path)
    if "model" in accepts and not is_path(text) and _known(text):
        return Target(text, "model")
    raise RunDirectoryError(_not_a_run(path))


def _not_a_run(path: Path, *, files: bool = True) -> str:
    """What a folder without a manifest is, and what may be meant: with ``files`` a model file in it, too."""
    if (above := _run_of(path)) is not None:
        return f"{path} is a folder of a run: give the run directory, {above}"
    runs = _runs_in(path)
    if runs:
        return f"{path} is not a run directory, it holds some: give one of them, such as {', '.join(runs[:NEAR])}"
    if any((path / name).is_dir() for name in ("train", *VAL_FOLDERS)):
        return f"{path} is not a run directory: if it holds images, give it as `data.path`"
    models = [file for suffix in MODEL_FILES for file in sorted(path.glob(f"*{suffix}"))]
    hint = f", or the file {models[0]}" if models and files else ""
    return (
        f"{path} is not a run directory: it has no manifest.json; give one that has{hint}{_near_runs(path)}"
    )


def _no_model(path: Path, wanted: str) -> str:
    """What a file is that is not a model, and what takes it."""
    quoted = shlex.quote(str(path))
    if (run := _run_of(path)) is not None:
        return f"{path} is a file of a run: give the run directory, {run}"
    if path.name.endswith("policy.json"):
        return f"{path} holds bits and no model: give `model.name` `quantization.policy={quoted}`"
    if path.suffix in FLOAT_WEIGHTS:
        return f"{path} holds float weights without their network: give `model.name` `model.weights={quoted}`"
    return f"{path} is not a model file of saq: give {wanted}"


def _cannot(target: Target, called: str, wanted: str) -> str:
    """Why the command cannot work on ``target``, which is there."""
    run = _run_of(target.path) if target.path else None
    if target.kind == "onnx":
        where = f", {run}" if run else ", or the .safetensors file, that it came from"
        return f"{target.text} is an ONNX graph, which is final: give the run directory{where}"
    if target.kind == "safetensors":
        where = f", {run}" if run else ""
        return f"{target.text} names a file: give a run directory{where}"
    if target.kind == "model":
        return (
            f"{target.text} is a model that is not quantized: quantize it with `saq quantize {target.text}`, "
            f"then give its run directory as {called}"
        )
    return f"{target.text} is {CALLED[target.kind]}: give {wanted}"


def _check_name(text: str, path: Path, accepts: Sequence[Kind]) -> None:
    """Refuse what names neither a model nor anything else.

    Raises:
        UnknownModel: where a model's name is accepted; with names that are near.
        ConfigError: elsewhere.
    """
    try:
        check_model_name(text)
    except UnknownModel as error:
        near = _near_runs(path)
        if "model" in accepts:
            raise UnknownModel(f"{error}; there is no run directory or file of that name{near}") from None
        raise ConfigError(f"there is no run directory or file {printable(text, 200)}{near}") from None


def _known(name: str) -> bool:
    try:
        check_model_name(name)
    except UnknownModel:
        return False
    return True


def _run_of(path: Path) -> Path | None:
    """The run directory that ``path`` lies in, at most three folders up."""
    return next((above for above in list(path.parents)[:3] if (above / "manifest.json").is_file()), None)


def _runs_in(folder: Path) -> list[str]:
    """The run directories in ``folder``, sorted."""
    try:
        return [str(each) for each in sorted(folder.iterdir()) if (each / "manifest.json").is_file()]
    except OSError:
        return []


def _near_runs(path: Path) -> str:
    """Runs beside ``path``, or in ``runs/``, with a name like its; as the end of a message."""
    there = [*_runs_in(path.parent), *_runs_in(Path("runs"))]
    named = {Path(run).name: run for run in reversed(there)}
    near = difflib.get_close_matches(path.name, named, n=NEAR, cutoff=0.6)
    return f"; near are {', '.join(named[name] for name in near)}" if near else ""
