"""Quantizers and published recipes from the command line, on real handwritten digits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import saqcli
from saqcli.cli import app
from saqcli.config import TrainingSection, recipes, resolve
from saqcli.errors import ConfigError
from saqcli.pipelines.bits import make_searcher, scheme_of
from saqcli.quant.quantizers import QUANTIZERS
from saqcli.training.optimizer import check_training, make_optimizer, make_schedule
from tests.support import tiny
from tests.support.cases import scheme_with
from tests.support.digits import MODEL, float_options

QUICK = ("--set", "data.calibration_images=128", "--set", "data.verify_images=50")
PAPER = ("paper-cifar", "paper-imagenet")


def saq(*arguments: object) -> Any:
    """Run a command, which must succeed, and return its JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def calibration(quantizer: str, digits: Path, run: Path) -> list[object]:
    """The command that calibrates without training."""
    options = ("--quantizer", quantizer, "--bits", 5, "--epochs", 0, *QUICK, "--run-dir", run)
    return ["quantize", MODEL, *float_options(digits), *options]


def calibrated(quantizer: str, digits: Path, run: Path) -> dict[str, Any]:
    answer: dict[str, Any] = saq(*calibration(quantizer, digits, run), "--no-export")
    return answer


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_valid(name: str) -> None:
    config = resolve(recipe=name, options={"model.name": MODEL})
    scheme_of(config.quantization).check()
    check_training(config)


@pytest.mark.parametrize("name", PAPER)
def test_published_recipes_match_the_papers(name: str) -> None:
    config = resolve(recipe=name, options={"model.name": MODEL})
    cifar = name == "paper-cifar"
    assert config.quantization.model_dump(
        include={
            "quantizer",
            "weight_grid",
            "granularity",
            "weight_normalization",
            "restore_deviation",
            "clip_init",
        }
    ) == {
        "quantizer": "clip",
        "weight_grid": "paper",
        "granularity": "tensor",
        "weight_normalization": True,
        "restore_deviation": False,
        "clip_init": "paper",
    }
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, config.training)
    schedule = make_schedule(optimizer, config.training, steps=10)
    rates = []
    for epoch in (0, 79, 80, 119, 120):
        schedule.step_update(10 * epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    assert config.training.minimizer == {"bn_second_pass": "update"}
    assert config.training.rho is None  # the paper's, by bit-width
    if cifar:
        assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])
        assert (config.data.batch_size, config.training.epochs) == (128, 200)
    else:
        assert rates[0] == pytest.approx(0.02)
        assert rates[-1] == pytest.approx(0.0)
        assert (config.data.batch_size, config.training.epochs) == (512, 90)
    assert config.training.sharpness_batch == 128


def test_published_searches_match_the_papers() -> None:
    named = {"model.name": MODEL, "quantization.bops": "w4a4"}
    samq, asga = (resolve(recipe=f"paper-{name}", options=named) for name in ("samq", "asga"))
    cifar = resolve(recipe="paper-cifar", options=named)
    assert samq.training == cifar.training
    assert (samq.quantization.searcher, samq.quantization.candidates) == ("samq", (2, 3, 4, 5))
    found: Any = make_searcher(samq)
    assert (found.epochs, found.warmup, tuple(found.milestones)) == (100, 10, (50,))
    assert (found.cost_unit, found.cost_weight, found.penalty_center) == ("M", 1e-4, "budget")
    assert (found.controller_lr, found.controller_decay, found.entropy_weight) == (5e-4, 5e-5, 5e-3)
    assert (found.draws, found.select_by, found.score_in) == (20, "accuracy", "supernet")
    assert not found.compare_reference
    found = make_searcher(asga)
    assert (found.epochs, asga.search.lr, found.rho_max) == (90, 0.01, 0.1)
    training = asga.training
    assert (training.lr, training.schedule, training.warmup_epochs) == (0.04, "cosine", 5)
    assert resolve(recipe="later-saq", options=named).training.perturb == "layers"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search.options": {"samq": {"warmup": -1}}}, "search.options.samq.warmup -1 is not possible"),
        (
            {"search.options": {"samq": {"milestones": [5, 2]}}},
            r"search.options.samq.milestones \[5, 2\] is not",
        ),
        ({"search.options": {"samq": {"controller_betas": [1]}}}, "search.options.samq.controller_betas"),
        ({"search.epochs": 0.5}, "`search.epochs` 0.5 is not possible"),
    ],
)
def test_options_of_a_searcher_are_named(given: dict[str, Any], message: str) -> None:
    named = {"model.name": MODEL, "quantization.bops": "w4a4", "quantization.searcher": "samq"}
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_searcher(resolve(options=named | given))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("paper-samq", ("--epochs", 2, "--set", "search.options.samq.warmup=1")),
        ("paper-asga", ("--epochs", 1, "--set", "search.options.asga.step_images=32")),
    ],
)
def test_published_search_finds_bits(
    name: str, options: tuple[object, ...], digits: Path, tmp_path: Path
) -> None:
    """One controller phase of ``paper-samq`` follows an epoch of even draws at ten times the learning rate."""
    more = ("--set", "search.options.samq.milestones=[1]") if name == "paper-samq" else ()
    answer = saq(
        *(
            "search",
            MODEL,
            *float_options(digits, digits / "few"),
            "--recipe",
            name,
            "--budget",
            "w4a4",
            *options,
            *more,
        ),
        *("--search-images", 200, "--set", "data.batch_size=32", "--set", "data.augmentation=none"),
        *("--run-dir", tmp_path / "run"),
    )
    assert answer["searcher"] == name.removeprefix("paper-")
    assert 0.985 * answer["budget_bops"] <= answer["bops"] <= answer["budget_bops"]


@pytest.mark.parametrize("name", [PAPER[0], pytest.param(PAPER[1], marks=pytest.mark.slow)])
def test_published_recipe_gives_verified_files(name: str, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    answer = saq(
        *("quantize", MODEL, *float_options(digits), "--recipe", name, "--bits", 4, "--epochs", 1),
        *("--batch-size", 32, "--set", "data.augmentation=none", *QUICK, "--run-dir", run),
    )
    evaluated = saq("eval", run, "--data", digits / "images")
    exported = saq("export", run, "--onnx", tmp_path / "again.onnx")

    assert answer["calibrated_top1"] < 70  # clipped at one deviation, it must learn again
    assert answer["top1"] > 70
    assert evaluated["top1"] == answer["top1"]
    assert answer["onnx_layers_error"] < 1e-5
    assert exported["verified"] is True


@pytest.mark.parametrize(
    "name",
    [pytest.param("lsq", marks=pytest.mark.slow), "lsq_plus", pytest.param("pact", marks=pytest.mark.slow)],
)
def test_quantizer_option_is_saved_and_reloaded(name: str, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    answer = calibrated(name, digits, run)

    assert json.loads((run / "config.json").read_text())["quantization"]["quantizer"] == name
    assert answer["calibrated_top1"] > answer["float_top1"] - 5
    assert saq("eval", run, "--data", digits / "images")["top1"] == answer["top1"]


def test_transformed_weights_resume_bit_identically(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files hold folded weights, checkpoints latent ones: a model resumed from a checkpoint transforms again."""
    import saqcli.pipelines.export as workflow

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "export_verified", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        CliRunner().invoke(app, list(map(str, calibration("dorefa", digits, run))))
    manifest = json.loads((run / "manifest.json").read_text())
    answer = saq(*calibration("dorefa", digits, run), "--resume")

    assert manifest["status"] != "finished"
    assert answer["calibrated_top1"] > answer["float_top1"] - 5
    assert saq("eval", run, "--data", digits / "images")["top1"] == answer["top1"]
    with torch.no_grad():
        assert saqcli.load(run)(torch.randn(2, 1, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer_parameters_have_own_optimizer_group(name: str) -> None:
    net, x = tiny.build("conv_bn")
    layers = tiny.quantized(net, x, scheme=scheme_with(name))
    training = TrainingSection(lr=0.1, clip_lr_factor=0.5, weight_decay=1e-3)
    optimizer = make_optimizer(net, training)
    learned = [
        p for layer in layers.values() for q in (layer.weight_quantizer, layer.input_quantizer)
        for p in q.parameters()
    ]  # fmt: skip
    others, clips = optimizer.param_groups
    assert {id(p) for p in clips["params"]} == {id(p) for p in learned}
    assert len(others["params"]) + len(learned) == len(list(net.parameters()))
    assert (clips["lr"], clips["weight_decay"]) == (0.05, 0.0)
    assert (others["lr"], others["weight_decay"]) == (0.1, 1e-3)


def test_granularity_and_normalization_are_options(digits: Path, tmp_path: Path) -> None:
    planned = saq(
        *("quantize", MODEL, *float_options(digits), "--bits", 4, "--granularity", "tensor", "--weight-norm"),
        "--dry-run",
    )
    quantization = planned["config"]["quantization"]
    assert (quantization["granularity"], quantization["weight_normalization"]) == ("tensor", True)

    planned = saq(
        *("quantize", MODEL, *float_options(digits), "--bits", 4, "--recipe", "paper-cifar"),
        *("--no-weight-norm", "--dry-run"),
    )
    assert planned["config"]["quantization"]["weight_normalization"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantizer", "magic"), "there is no quantizer 'magic'"),
        (("--quantizer", "lsq", "--weight-norm"), "quantizer lsq has no weight normalization"),
        (("--quantizer", "pact", "--set", "quantization.clip_init=paper"), "not defined for quantizer pact"),
        (("--recipe", "paper-cifar", "--compensate"), "restore_deviation=false changes their scale"),
        (("--recipe", "paper-cifar", "--short-steps", "5"), "not supported with --short-steps"),
    ],
)
def test_incompatible_options_fail_early(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = CliRunner().invoke(
        app, ["quantize", MODEL, "--bits", "4", *options, "--data", "nowhere", "--run-dir", str(run)]
    )
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not run.exists()
