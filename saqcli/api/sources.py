"""Sources of commands: run directories, model files and model names."""

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saqcli.config import ModelSection, names_own_network
from saqcli.data.folders import VAL_FOLDERS
from saqcli.errors import ConfigError, RunDirectoryError, UnknownModel
from saqcli.models.libraries import ZOOS
from saqcli.models.load import check_model_name
from saqcli.models.own import OwnNetwork, own_network, suggest_own
from saqcli.runs.directory import RunDirectory
from saqcli.runs.listing import FOLDER, runs_in
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
NEAR = 3  # similar names in a message


@dataclass(frozen=True)
class Source:
    """The source of a command.

    Attributes:
        text: as given.
        kind: its kind.
        path: path of the run directory or file; None for a model name.
    """

    text: str
    kind: Kind
    path: Path | None = None

    @property
    def run(self) -> RunDirectory | None:
        """The run directory; None for other kinds."""
        return RunDirectory.open(self.path) if self.kind == "run" and self.path else None


def find_source(text: str, accepts: Sequence[Kind], called: str = "SOURCE") -> Source:
    """The source that ``text`` refers to; nothing is loaded or read.

    Args:
        text: a path, in which ``~`` is the home folder, or a model name.
        accepts: the kinds that the command accepts.
        called: name of the argument in messages.

    Raises:
        ConfigError: no such file, or a kind that the command does not accept.
        RunDirectoryError: a folder that is not a run.
        UnknownModel: no model, run or file of that name.
    """
    wanted = " or ".join(
        filter(None, (", ".join(CALLED[kind] for kind in accepts[:-1]), CALLED[accepts[-1]]))
    )
    if not text.strip():
        raise ConfigError(f"{called} is empty: give {wanted}")
    path = named_path(text)
    if names_own_network(text) and not path.exists():
        source = Source(text, "model")
        if "model" in accepts:
            check_model_name(text)
    elif path.is_dir():
        source = _folder(text, path, accepts)
    elif path.suffix in MODEL_FILES:
        source = Source(text, MODEL_FILES[path.suffix], path)
        if source.kind in accepts and not path.is_file():
            raise ConfigError(f"there is no file {path}{_near_runs(path)}")
    elif path.is_file() and path.suffix != ".py":
        raise ConfigError(_no_model(path, wanted))
    elif is_path(text) and not suggest_own(text):
        raise ConfigError(f"there is no run directory or file {printable(text, 200)}{_near_runs(path)}")
    else:
        _check_name(text, path, accepts)
        source = Source(text, "model")
    if source.kind not in accepts:
        raise ConfigError(_cannot(source, called, wanted))
    return source


def is_path(text: str) -> bool:
    """Whether ``text`` can only be a path, by prefixes and suffixes that model names do not have."""
    head, slash, _ = text.partition("/")
    library = head.lower() in ZOOS or ":" in head
    endings = (*MODEL_FILES, *FLOAT_WEIGHTS, *OTHER_FILES)
    return (
        text.startswith((".", "/", "~"))
        or text.endswith(("/", *endings))
        or "\\" in text
        or (bool(slash) and not library)
    )


def is_model(text: str) -> bool:
    """Whether ``text`` is the name of a model, and can be no path."""
    if is_path(text):
        return False
    try:
        check_model_name(text)
    except UnknownModel:
        return False
    return True


def check_no_model_options(source: str, section: ModelSection) -> None:
    """Check that no model options are given for a file that contains its own model."""
    plain = ModelSection(name=section.name).model_dump()
    given = [f"`model.{name}`" for name, value in section.model_dump().items() if value != plain[name]]
    if given:
        raise ConfigError(f"{source} has its own network and preprocessing: remove {', '.join(given)}")


def check_not_run(name: str) -> None:
    """Check that a model name is not a run directory.

    Raises:
        ConfigError: it is one.
    """
    path = named_path(name)
    if (path / "manifest.json").is_file():
        run = RunDirectory.open(path)
        step = run.how_to_quantize() if run.policy_path.is_file() else run.next_step()
        raise ConfigError(f"{name} is a run of `saq {run.verb}`, not a model: {step}")


def model_file(run: RunDirectory) -> Path:
    """The safetensors file of a run.

    Raises:
        RunDirectoryError: a run of another command, or one without a model yet.
    """
    manifest = run.manifest()
    if manifest.verb != "quantize":
        state = "" if manifest.status == "finished" else f"; it {run.status_text()}"
        raise RunDirectoryError(
            f"{run.path} is a run of `saq {manifest.verb}`, which holds bits but no model{state}: {run.next_step()}"
        )
    if not run.safetensors_path.is_file() or manifest.status == "clearing":
        raise RunDirectoryError(f"{run.path} holds no model: it {run.status_text()}, {run.next_step()}")
    return run.safetensors_path


def named_builder(source: Source | None, builder: str | None) -> OwnNetwork | None:
    """The network of one's own that ``builder`` names, for a run or file that was made from it; it is imported.

    Raises:
        ConfigError: the source is a model name, or ``builder`` names nothing that builds a network.
    """
    if builder is None or source is None:
        return None
    if source.kind == "model":
        raise ConfigError(
            f"`builder={builder}` belongs to a run or file, and {source.text} is a model name: remove it"
        )
    return own_network(builder)


def named_file(source: Source, section: ModelSection) -> Path | None:
    """The model file of ``source``: the file itself, the model of a run directory, or None for a model name.

    Raises:
        SaqError: a run without a model, or model options for a file.
    """
    if source.kind == "model":
        return None
    check_no_model_options(source.text, section)
    run = source.run
    return source.path if run is None else model_file(run)


def policy_file(text: str) -> Path:
    """The policy file ``text``, or that of a run directory.

    Raises:
        ConfigError: a folder that is not a run.
        RunDirectoryError: a run without a policy yet.
    """
    path = named_path(text)
    if not path.is_dir():
        return path
    if not (path / "manifest.json").is_file():
        raise ConfigError(f"`quantization.policy`: {_not_a_run(path, files=False)}")
    run = RunDirectory.open(path)
    if not run.policy_path.is_file():
        raise RunDirectoryError(
            f"`quantization.policy={path}` holds no policy.json: it {run.status_text()}, {run.next_step()}"
        )
    return run.policy_path


def _folder(text: str, path: Path, accepts: Sequence[Kind]) -> Source:
    """The source for an existing folder: a run directory, or a model of the same name."""
    if (path / "manifest.json").is_file():
        return Source(text, "run", path)
    if "model" in accepts and is_model(text):
        return Source(text, "model")
    raise RunDirectoryError(_not_a_run(path))


def _not_a_run(path: Path, *, files: bool = True) -> str:
    """The message about a folder that is not a run; with ``files`` it suggests model files in the folder too."""
    if (above := _run_of(path)) is not None:
        return f"{path} is a folder inside a run: give the run directory, {above}"
    runs = _runs_in(path)
    if runs:
        return f"{path} contains run directories but is not one: give one of them, such as {', '.join(runs[:NEAR])}"
    if any((path / name).is_dir() for name in ("train", *VAL_FOLDERS)):
        return f"{path} is not a run directory: if it holds images, give it as `data.path`"
    models = [file for suffix in MODEL_FILES for file in sorted(path.glob(f"*{suffix}"))]
    hint = f", or the file {models[0]}" if models and files else ""
    return f"{path} is not a run directory: it has no manifest.json; give a run directory{hint}{_near_runs(path)}"


def _no_model(path: Path, wanted: str) -> str:
    """The message about a file that is not a model."""
    quoted = shlex.quote(str(path))
    if (run := _run_of(path)) is not None:
        return f"{path} is a file inside a run: give the run directory, {run}"
    if path.name.endswith("policy.json"):
        return f"{path} holds bits but no model: give `model.name` `quantization.policy={quoted}`"
    if path.suffix in FLOAT_WEIGHTS:
        return f"{path} holds float weights but no network: give `model.name` `model.weights={quoted}`"
    return f"{path} is not a model file of saq: give {wanted}"


def _cannot(source: Source, called: str, wanted: str) -> str:
    """The message about an existing source of the wrong kind."""
    run = _run_of(source.path) if source.path else None
    if source.kind == "onnx":
        where = f", {run}" if run else " or the .safetensors file that it came from"
        return f"{source.text} is an ONNX graph, which is final: give the run directory{where}"
    if source.kind == "safetensors":
        where = f", {run}" if run else ""
        return f"{source.text} is a file: give a run directory{where}"
    if source.kind == "model":
        return (
            f"{source.text} is a model that is not quantized: quantize it with `saq quantize {source.text}`, "
            f"then give its run directory as {called}"
        )
    return f"{source.text} is {CALLED[source.kind]}: give {wanted}"


def _check_name(text: str, path: Path, accepts: Sequence[Kind]) -> None:
    """Check a model name.

    Raises:
        UnknownModel: unknown, where model names are accepted; suggests similar names.
        ConfigError: unknown, where they are not.
    """
    try:
        check_model_name(text)
    except UnknownModel as error:
        near = _near_runs(path)
        if "model" in accepts:
            raise UnknownModel(f"{error}; there is no run directory or file of that name{near}") from None
        raise ConfigError(f"there is no run directory or file {printable(text, 200)}{near}") from None


def _run_of(path: Path) -> Path | None:
    """The run directory that contains ``path``, at most three levels up."""
    return next((above for above in list(path.parents)[:3] if (above / "manifest.json").is_file()), None)


def _runs_in(folder: Path) -> list[str]:
    """The run directories in ``folder``, sorted."""
    return sorted(map(str, runs_in(folder)))


def _near_runs(path: Path) -> str:
    """The end of a message that lists runs of similar name next to ``path`` or in ``runs/``."""
    there = [*_runs_in(path.parent), *_runs_in(FOLDER)]
    named = {Path(run).name: run for run in reversed(there)}
    near = difflib.get_close_matches(path.name, named, n=NEAR, cutoff=0.6)
    return f"; similar: {', '.join(named[name] for name in near)}" if near else ""
