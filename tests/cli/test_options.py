"""Options are made from the settings: names, choices, parsing and completion."""

from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from saqcli.analysis import INSTRUMENTS
from saqcli.cli import app, options
from saqcli.cli.analyze import OURS
from saqcli.cli.flags import as_flags, command_of
from saqcli.cli.options import SETTINGS, Given, adapted, flag_of, listed, with_settings
from saqcli.config import DataSection, RunConfig, recipes
from saqcli.errors import SaqError
from saqcli.export import STYLES
from saqcli.pipelines import quantize
from saqcli.quant.costs import COSTS
from saqcli.quant.quantizers import QUANTIZERS
from saqcli.runs.trackers import TRACKERS
from saqcli.searchers import SEARCHERS
from saqcli.target import TARGETS
from saqcli.training.minimizers import MINIMIZERS
from tests.support.command_line import answer, last_error, saq

COMMANDS: Any = get_command(app).commands  # type: ignore[attr-defined]
TABLES = {
    "quantization.searcher": SEARCHERS,
    "quantization.cost": COSTS,
    "quantization.target": TARGETS,
    "quantization.quantizer": QUANTIZERS,
    "quantization.weight_quantizer": QUANTIZERS,
    "quantization.activation_quantizer": QUANTIZERS,
    "training.method": MINIMIZERS,
    "export.styles": STYLES,
    "run.track": TRACKERS,
    "recipe": recipes(),
}
GENERAL = "--json --quiet --verbose -q"
RUN = (
    "--config --deterministic --device --dry-run --overwrite --recipe --resume --run-dir --seed "
    f"--set --track {GENERAL}"
)
IMAGES = (
    "--bad-images --batch-size --class-map --class-order --data --exif-transpose --no-exif-transpose --split "
    "--workers"
)
NETWORK = (
    "--in-chans --input-size --mean --model-kwargs --no-pretrained --num-classes --pretrained --std --weights "
    "--weights-key"
)
BITS = (
    "--activation-candidates --activation-quantizer --bops --budget --candidates --correct-bias --cost "
    "--granularity --max-drop --min-top1 --new-head --no-correct-bias --no-quantize-attention --no-recalibrate-bn "
    "--target --no-weight-norm --pin --quantize-attention --quantizer --recalibrate-bn --searcher --short-steps --size "
    "--weight-grid --weight-norm --weight-quantizer"
)
ACCEPTED = {
    "quantize": f"{BITS} {IMAGES} {NETWORK} {RUN} --ascent-fraction --balance-norms --bits --cache --clip-grad "
    "--compile --cutmix --dampening --distill --no-distill "
    "--efficient --ema --epochs --export --label-smoothing --lr --memory-format --method --micro-batch "
    "--mixup --no-balance-norms --no-export "
    "--optimizer --perturb --policy --precision --rho --rho-unit --sam-interval --sam-reuse --sharpness-batch "
    "--sharpness-from --style "
    "--verify-images --calibration --compensate --no-compensate --reconstruct --no-reconstruct --iterations",
    "search": f"{BITS} {IMAGES} {NETWORK} {RUN} --from --cache --calibration --epochs --lr --pareto --proxy --rho "
    "--scoring-images --search-classes --search-images --weight-error",
    "rerun": f"--builder {GENERAL} --calibration --data --device --overwrite --resume --run-dir --weights "
    "--workers",
    "eval": f"--builder {IMAGES} {NETWORK} {GENERAL} --batch-sizes --bench --device --memory-format "
    "--repeats --threads",
    "export": f"--builder {IMAGES} {GENERAL} --onnx --overwrite --style --target --verify --verify-images",
    "profile": f"--builder {GENERAL} --bops --budget --size --bits --candidates --in-chans --input-size "
    "--model-kwargs --no-pretrained "
    "--no-quantize-attention --num-classes --policy --pretrained --quantize-attention --weights --weights-key "
    "--measure --out --repeats --style --target --threads --widths",
    "analyze": f"--builder {IMAGES} {NETWORK} {GENERAL} --against --all --bits --candidates --device --distributions "
    "--eigenvalue --flips --grid --hessian --images --iterations --landscape --out --overwrite --policy --resume --rho "
    "--rho-unit --samples --seed --sensitivity --set --sharpness --span --split --starts --trace",
    "report": "--json --verbose --out",
    "runs": "--json --verbose --yes -y",
    "models": "--json --verbose",
    "targets": "--json --verbose",
    "demo": f"{GENERAL} --bops --budget --epochs --run-dir --seed --track",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_commands_accept_these_options(name: str) -> None:
    found = {
        each for parameter in COMMANDS[name].params for each in (*parameter.opts, *parameter.secondary_opts)
    }

    assert {each for each in found if each.startswith("-")} == set(ACCEPTED[name].split())


@pytest.mark.parametrize("path", TABLES)
def test_choices_are_those_of_the_tables(path: str) -> None:
    assert sorted(SETTINGS[path].choices) == sorted(TABLES[path])


def test_remarks_on_styles_are_their_descriptions() -> None:
    remarks = SETTINGS["export.styles"].option.choices

    assert remarks == {name: STYLES[name].description for name in remarks or ()}


def test_instruments_have_the_help_of_their_table() -> None:
    analyze = command_of("analyze", COMMANDS["analyze"].params)
    described = {name: as_flags(entry.description, analyze) for name, entry in INSTRUMENTS.items()}
    helped = {each.opts[0][2:]: each.help for each in COMMANDS["analyze"].params}

    assert described == OURS == {name: helped[name] for name in described}


def test_settings_know_their_flags() -> None:
    expected = {
        "training.lr": "--lr",
        "search.lr": "--lr",
        "training.ema_decay": "--ema",
        "quantization.bops": "--bops",
        "quantization.pins": "--pin",
        "quantization.weight_normalization": "--weight-norm",
        "data.eval_batch_size": "--batch-size",
        "export.styles": "--style",
        "recipe": "--recipe",
        "training.momentum": None,
        "model.name": None,
        "no.such": None,
    }
    assert {path: flag_of(path) for path in expected} == expected


def test_every_flag_sets_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[RunConfig] = []

    def take(config: RunConfig, *_: object, **__: object) -> None:
        found.append(config)
        raise SaqError("enough")

    monkeypatch.setattr(quantize, "quantize", take)
    pins = ("--pin", "layer1.*=8", "--pin", "fc=w8a4")
    saq("quantize", "saq/resnet20", *("--bits", 4, "--style", "trt", "--style", "qdq", "--distill"), *pins)
    saq("quantize", "saq/resnet20", *("--bops", "w4a4", "--no-export", "--weights", "a//b.pth", "--ema", 0.5))

    first, second = found
    assert first.quantization.pins == {"layer1.*": "8", "fc": "w8a4"}
    assert (first.quantization.bits, first.export.styles, first.training.distill) == (
        "4",
        ("trt", "qdq"),
        True,
    )
    assert (second.quantization.bops, second.export.styles, second.training.ema_decay) == ("w4a4", (), 0.5)
    assert second.model.weights == str(Path("a/b.pth"))


def test_all_unreadable_texts_are_reported_together() -> None:
    result = saq(
        "eval", "saq/resnet20", "--mean", "a", "--input-size", "0", "--class-order", "", "--data", "x"
    )

    assert result.exit_code == 1
    for message in ("--mean a: give numbers", "--input-size 0: give one side"):
        assert message in last_error(result)


def test_sections_fall_back_to_what_can_be_checked() -> None:
    given = Given()
    given |= {"data.path": "images", "data.batch_size": 0}

    assert given.data() == DataSection(path="images")
    assert "batch_size" in str(given.problems.errors[0])
    assert given.model("resnet18").name == "resnet18"


def test_a_command_can_change_an_option() -> None:
    received: list[Given] = []

    @with_settings("data", adapted("training.lr", default="1", help="Rate"), without=["data.workers"])
    def command(given: Given, extra: bool = False) -> None:
        received.append(given)

    parameters = options.inspect.signature(command).parameters
    assert parameters["training__lr"].annotation.__metadata__[0].help == "Rate [default: 1]"
    assert "data__workers" not in parameters
    assert list(parameters)[-1] == "extra"
    command(**dict.fromkeys(parameters) | {"data__path": "x", "data__verify_images": "all"})
    assert received == [{"data.path": "x", "data.verify_images": "all"}]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("saq quantize --method as", ["asaq"]),
        ("saq search --granularity ", ["channel", "tensor"]),
        ("saq eval --bad-images s", ["skip"]),
        ("saq quantize --weight-n", ["--weight-norm"]),
    ],
)
def test_choices_are_completed(words: str, completed: list[str]) -> None:
    environment = {"_SAQ_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": words}
    environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}

    result = CliRunner().invoke(app, [], env=environment, prog_name="saq")

    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == completed


def test_choices_are_listed_as_a_sentence() -> None:
    assert listed({"saq": "", "asaq": "adaptive radius", "qat": ""}) == "saq, asaq (adaptive radius) or qat"
    assert (listed({"one": ""}), listed({})) == ("one", "")


@pytest.mark.parametrize("name", ["SAQ/ResNet20", "saq/RESNET20"])
def test_names_of_networks_resolve_in_any_case(name: str) -> None:
    assert answer("profile", name, "--bits", 4)["model"] == "saq/resnet20"
