"""Settings that messages of the library name become flags of the command that runs."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from saqcli.cli.app import app
from saqcli.cli.flags import ARGUMENTS, Command, as_flags, command_of, flags_in
from saqcli.pipelines import quantize
from saqcli.runs.directory import RunDirectory
from tests.support.command_line import last_error, saq

GROUP: Any = typer.main.get_command(app)
QUANTIZE, SEARCH, EVAL, EXPORT = (
    command_of(verb, GROUP.commands[verb].params) for verb in ("quantize", "search", "eval", "export")
)
RERUN, DEMO = (command_of(verb, GROUP.commands[verb].params) for verb in ("rerun", "demo"))


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("`data.batch_size=8`", "--batch-size 8"),
        ("`data.batch_size`", "--batch-size"),
        ("`data.path=DIR` with train/", "--data DIR with train/"),
        ("use `model.name` `model.weights=a b.pth`", "use MODEL --weights a b.pth"),
        ("`quantization.pins=layer4.*=8`", "--pin layer4.*=8"),
        ("`quantization.candidates=(2, 3, 4)`", "--candidates 2,3,4"),
        ("`training.ema_decay=0.9`", "--ema 0.9"),
        ("`model.new_head=True`", "--new-head"),
        ("`model.pretrained=False`", "--no-pretrained"),
        ("`quantization.weight_normalization=False`", "--no-weight-norm"),
        ("`export.styles=()`", "--no-export"),
        ("`data.class_map=(x)`", "--class-map (x)"),
        ("`data.class_map=True`", "--class-map True"),
        ("`data.class_map=`", "--class-map ''"),
        ("`model.new_head=False`", "--set model.new_head=false"),
        ("`run_dir=`", "--run-dir ''"),
        ("`run_dir=True`", "--run-dir True"),
        ("`training.milestones=(30, 60)`", "--set 'training.milestones=[30,60]'"),
        ("`overwrite=True`, or another `run_dir`", "--overwrite, or another --run-dir"),
    ],
)
def test_settings_become_flags(text: str, typed: str) -> None:
    assert as_flags(text, QUANTIZE) == typed


@pytest.mark.parametrize(
    "text",
    [
        *("a line `FOLDER CLASS` each", "`saq models` lists them", "`model.safetensors`", "`layer4.0.conv1`"),
        *("`data.nothing=1`", "`modes=3`", "`quantize(1 +)`", "`quantize(x)`", "model.weights=FILE"),
        *("missing argument `out`", "`path`", "`model`", "`threads`"),
    ],
)
def test_other_names_stay(text: str) -> None:
    assert as_flags(text, QUANTIZE) == text


@pytest.mark.parametrize(
    ("text", "quantize", "search"),
    [
        ("`quantization.bops=34G`", "--bops 34G", "--budget 34G"),
        ("`search.epochs=2`", "--set search.epochs=2", "--epochs 2"),
        ("`training.epochs=2`", "--epochs 2", "--set training.epochs=2"),
        ("`search.images`", "--set search.images", "--search-images"),
        ("`training.keep=best`", "--set training.keep=best", "--set training.keep=best"),
        ("`training.decay_clips=True`", *2 * ("--set training.decay_clips=true",)),
        ("`search.options.asga.step_images=4`", *2 * ("--set search.options.asga.step_images=4",)),
        ("`data.eval_batch_size=4`", *2 * ("--set data.eval_batch_size=4",)),
    ],
)
def test_flags_are_those_of_the_command(text: str, quantize: str, search: str) -> None:
    assert (as_flags(text, QUANTIZE), as_flags(text, SEARCH)) == (quantize, search)


def test_commands_without_set_have_other_flags() -> None:
    assert (
        as_flags("`data.eval_batch_size=4` `model.num_classes=3`", EVAL) == "--batch-size 4 --num-classes 3"
    )
    assert (
        as_flags("another `path` or `style`, `runtimes=x`", EXPORT) == "another --onnx or --style, --verify x"
    )


def test_calls_become_command_lines() -> None:
    path = "it's here/x"
    call = f"resume with `quantize(run_dir={path!r}, resume=True)`"
    rerun = f"`rerun({path!r}, run_dir='new', resume=True)`"

    assert as_flags(call, QUANTIZE) == f"resume with `saq quantize --run-dir {shlex.quote(path)} --resume`"
    assert as_flags(rerun, QUANTIZE) == f"`saq rerun {shlex.quote(path)} --run-dir new --resume`"
    assert as_flags("`evaluate(bench=True)`", SEARCH) == "`saq eval --bench`"


@pytest.mark.parametrize(
    ("text", "command", "typed"),
    [
        ("`model.pretrained=False`", RERUN, "`saq quantize --no-pretrained`"),
        ("`training.keep=best`", DEMO, "`saq quantize --set training.keep=best`"),
        ("`resume=True` `training.keep=best`", DEMO, "`saq quantize --resume --set training.keep=best`"),
        ("`resume=True` `training.keep=best`", RERUN, "`saq quantize --resume --set training.keep=best`"),
        ("`resume=True` `training.keep=best`", QUANTIZE, "--resume --set training.keep=best"),
        ("`search.epochs=2`", EVAL, "`saq search --epochs 2`"),
        ("`model.num_classes=2` `model.new_head=True`", EVAL, "`saq quantize --num-classes 2 --new-head`"),
        ("`model.name` `model.weights=x`", RERUN, "`saq quantize MODEL --weights x`"),
        ("a lower `training.lr`", RERUN, "a lower `training.lr`"),
        ("`data.batch_size`", EVAL, "`data.batch_size`"),  # its --batch-size is another setting
        ("`resume=True`", DEMO, "`resume=True`"),
        ("`nproc_per_node=2`", EVAL, "--nproc-per-node 2"),
    ],
)
def test_no_command_is_told_flags_of_another(text: str, command: Command, typed: str) -> None:
    assert as_flags(text, command) == typed


def test_several_processes_are_started_by_torchrun() -> None:
    call = "`search(nproc_per_node=2, config='a b.json', run_dir='new')`"

    typed = "`torchrun --nproc-per-node 2 -m saqcli search --config 'a b.json' --run-dir new`"
    assert as_flags(call, RERUN) == typed


def test_unexpected_errors_are_printed_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("missing argument `resume`, `data.batch_size=3`")

    monkeypatch.setattr(quantize, "quantize", fail)

    error = last_error(saq("quantize", "saq/resnet20", "--bits", 4))
    assert "TypeError: missing argument `resume`, `data.batch_size=3`. Please report" in error


def test_json_keeps_keys_and_numbers() -> None:
    found = flags_in({"`overwrite`": ["use `overwrite=True`", 1, None], "nested": {"x": ("`resume=True`",)}})

    assert found == {"`overwrite`": ["use --overwrite", 1, None], "nested": {"x": ["--resume"]}}


def test_every_flag_of_the_table_exists() -> None:
    commands = [command_of(verb, each.params) for verb, each in GROUP.commands.items()]
    options = frozenset().union(*(command.options for command in commands))
    outside = {"--nproc-per-node"}  # an option of torchrun
    assert set(ARGUMENTS.values()) - outside <= options


def test_the_running_command_is_taken() -> None:
    text = "no budget was given: use --budget 34G, --size 5MB, --max-drop 1, or several"

    assert text in last_error(saq("search", "saq/resnet20", "--data", "."))
    assert as_flags("`quantization.bops`") == "--bops"  # none is running any more


def test_the_library_names_settings(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    assert isinstance(QUANTIZE, Command)
    with pytest.raises(Exception, match=r"holds other files and no run: use another `run_dir`$"):
        RunDirectory(tmp_path, "quantize").check_usable(resume=False, overwrite=False)
