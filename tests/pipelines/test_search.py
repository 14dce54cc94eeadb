"""``saq search`` on handwritten digits: policies, files and errors."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli.analysis.base import Settings
from saqcli.api.arguments import widths_of
from saqcli.config import QuantizationSection, RunConfig, resolve
from saqcli.data.datasets import divide, open_split
from saqcli.pipelines.bits import TO_BE_TRAINED, given_policy, weight_error_of
from saqcli.pipelines.calibration import calibrate, install_quantizers
from saqcli.pipelines.quantize import prepare
from saqcli.progress import SILENT
from saqcli.quant.search_space import Candidates
from saqcli.searchers import SEARCHERS
from saqcli.tasks.classification import Score
from saqcli.training.loop import score
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options
from tests.support.sweeps import sweep

FREE, FIXED = 10_027_008, 36_864 + 640  # MACs of the network; first layer and classifier have 8 bits
UNIFORM = {bits: FREE * bits**2 + FIXED * 64 for bits in (2, 3, 4, 8)}  # its BOPs by bit-width
SMALL = ("--search-images", 192, "--scoring-images", 48, "--batch-size", 32, "--workers", 0)
QUICK = ("--searcher", "error")  # where the claim is about the request; all searchers keep the same contract
FAST: dict[str, tuple[object, ...]] = {
    "samq": (
        *("--epochs", 1, "--set", "search.options.samq.warmup=0"),
        *("--set", "search.options.samq.draws=2", "--search-images", 128),
    ),
    "asga": ("--epochs", 1, "--search-images", 128),
    "random": ("--set", "search.options.random.draws=3"),
    "hawq": ("--set", "search.options.hawq.samples=1", "--set", "search.options.hawq.images=24"),
    "sensitivity": ("--scoring-images", 24, "--candidates", "3,4,5"),
}


@pytest.fixture(scope="module")
def network(digits: Path) -> list[object]:
    """Options for the network, its weights and its images."""
    return [MODEL, *float_options(digits, digits / "few"), *SMALL]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def plain(network: list[object], runs: Path) -> tuple[Path, dict[str, Any]]:
    """A finished quick search, with its front."""
    path = runs / "plain"
    return path, answer(
        *("search", *network, "--budget", "w3a3", "--searcher", "error", "--pareto", 3, "--run-dir", path),
        *("--activation-candidates", "tied"),
    )


# Files of a search


@pytest.mark.parametrize("method", SEARCHERS)
def test_every_searcher_meets_the_budget(
    method: str, network: list[object], digits: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    found = answer(
        *("search", *network, "--budget", "w4a4", "--searcher", method, "--run-dir", path),
        *FAST.get(method, ()),
    )

    assert found["searcher"] == method
    assert found["model"] == MODEL
    assert found["budget_bops"] == UNIFORM[4]
    assert found["budget_bytes"] is None
    assert found["bops"] <= UNIFORM[4]
    assert found["bops"] >= 0.985 * UNIFORM[4] or not SEARCHERS[method].fills_budget
    assert found["bops"] == sum(layer["bops"] for layer in found["layers"])
    scored = method in ("samq", "random")
    assert (found["scoring_top1"] is not None) == (found["scoring_loss"] is not None)
    assert not scored or found["scored"] >= 1
    policy = json.loads((path / "policy.json").read_text())
    assert policy["model"] == MODEL
    assert policy["layers"] == found["policy"]
    assert policy["layers"]["conv1"] == policy["layers"]["linear"] == {"weight": 8, "activation": 8}
    kept = json.loads((path / "search.json").read_text())
    assert {key: kept[key] for key in found} == found
    assert kept["schema_version"] == 1
    assert len(kept["configurations"]) == found["scored"]
    there = {item.name for item in path.iterdir() if item.is_file()}
    assert there >= {"config.json", "manifest.json", "policy.json", "search.json", "policy.png", "policy.svg"}
    assert not (path / "checkpoints" / "search.ckpt").exists()
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["status"], manifest["results"]) == ("finished", found)
    for name in found["artifacts"].values():
        assert Path(name).is_file()


def test_pareto_files_are_written(plain: tuple[Path, dict[str, Any]]) -> None:
    path, found = plain
    assert {"pareto.json", "pareto.csv", "pareto.png", "pareto.svg"} <= set(found["artifacts"])
    front = json.loads((path / "pareto.json").read_text())
    assert front["budget_bops"] == UNIFORM[3]
    assert front["images"] == 48
    chosen = [point for point in front["points"] if point["kind"] == "chosen"]
    assert [point["bops"] for point in chosen] == [found["bops"]]
    assert chosen[0]["layers"] == found["policy"]
    bops = [point["bops"] for point in front["points"] if point["kind"] in ("proposed", "uniform")]
    assert min(bops) == UNIFORM[2]
    assert max(bops) == UNIFORM[8]


def test_profile_agrees_on_the_policy_cost(plain: tuple[Path, dict[str, Any]], digits: Path) -> None:
    path, found = plain
    options = ("--num-classes", 10, "--in-chans", 1, "--input-size", 16)
    shown = answer("profile", MODEL, *options, "--policy", path / "policy.json")
    assert (shown["bops"], shown["size_bytes"]) == (found["bops"], found["size_bytes"])


def test_policy_of_another_model_names_layers(plain: tuple[Path, dict[str, Any]]) -> None:
    path, _ = plain
    result = saq("profile", "saq/resnet32", "--policy", path / "policy.json")
    assert result.exit_code == 1
    for part in ("saq/resnet20", "does not fit saq/resnet32", "layer1.3.conv1"):
        assert part in last_error(result)


@pytest.mark.slow  # covered by tests/pipelines/test_rerun.py in every run
def test_quantize_uses_the_policy(
    plain: tuple[Path, dict[str, Any]], network: list[object], tmp_path: Path
) -> None:
    path, found = plain
    run = answer(
        *("quantize", MODEL, *network[1:-8], "--policy", path / "policy.json", "--epochs", 0),
        *("--set", "data.verify_images=20", "--run-dir", tmp_path / "run"),
    )
    assert run["policy"] == found["policy"]
    assert run["bops"] == found["bops"]


def test_tables_on_stdout_progress_on_stderr(
    plain: tuple[Path, dict[str, Any]], network: list[object], tmp_path: Path
) -> None:
    given = ("--budget", "w3a3", "--size", "200KB", "--searcher", "error", "--run-dir", tmp_path / "run")
    result = saq("search", *network, *given, "--activation-candidates", "tied")
    assert result.exit_code == 0
    assert "layer1.0.conv1" in result.stdout
    assert "policy.json" in result.stdout
    assert "reachable 42.51 M" in result.stderr
    assert "budget is 92.64 MBOPs" in result.stderr
    shares = r"searcher error: 92\.64 MBOPs \(100\.0 % of the budget\), 114\.8 KB \(57\.4 % of the budget\), \d+ s\n"
    assert re.search(shares, result.stdout)
    assert re.search(shares, result.stderr)


def test_pareto_front_is_printed_as_table(plain: tuple[Path, dict[str, Any]]) -> None:
    """Printed again by ``--resume``; ``--json`` has its rows."""
    path, found = plain
    points = {point["bops"]: point for point in json.loads((path / "pareto.json").read_text())["points"]}
    shown = saq("search", "--run-dir", path, "--resume").stdout
    assert "48 held-out training images (float: " in shown
    heading = re.search(r"budget +BOPs +size +score +on front +searcher *\n", shown)
    assert heading
    rows = shown[heading.end() :].split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows].count(
        "42.93"
    ) == 1  # of three budgets the one just above the floor
    assert len(rows) == len(found["front"]["points"])
    for row, line in zip(found["front"]["points"], rows, strict=True):
        assert f"{row['top1']:.2f} " in line
        assert f" {'yes' if row['on_front'] else 'no'} " in line
        assert row["top1"] == points[row["bops"]]["top1"]
    (chosen,) = (line for line in rows if line.rstrip().endswith("(chosen)"))
    assert re.fullmatch(
        r"92\.64 MBOPs +92\.64 M +114\.8 KB +[\d.]+ +(yes|no) +error w3a3 \(chosen\) *", chosen
    )
    assert sum(" uniform w" in line for line in rows) + sum(" error w" in line for line in rows) == 6


def test_operands_are_chosen_apart_unless_tied() -> None:
    """Null, in settings of older versions, is one width for both."""
    assert QuantizationSection().activation_candidates == "same"
    assert QuantizationSection(activation_candidates=None).activation_candidates == "tied"  # type: ignore[arg-type]
    assert QuantizationSection(activation_candidates=(4, 8)).activation_candidates == (4, 8)
    apart, tied = widths_of((2, 4), "same"), widths_of((2, 4), "tied")
    assert len(apart.options()) == 4
    assert tied == widths_of((2, 4), None) == Candidates((2, 4))


def test_default_candidates_agree() -> None:
    assert Settings().candidates == QuantizationSection().candidates == (2, 3, 4, 5, 6, 8)
    for verb in ("search", "quantize", "profile", "analyze"):
        shown = re.sub(r"[│\s]+", " ", saq(verb, "--help").stdout)
        assert "[default: 2,3,4,5,6,8]" in shown, verb


def test_quiet_prints_nothing(network: list[object], tmp_path: Path) -> None:
    given = ("--budget", "w3a3", "--searcher", "uniform", "--run-dir", tmp_path / "run")
    result = saq("search", *network, *given, "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""


# Where scores come from


def sets(**settings: object) -> tuple[object, ...]:
    """Return ``--set`` options."""
    return tuple(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))


@pytest.fixture(scope="module")
def scoring(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits whose validation images are those a search holds out for scoring."""
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "train").symlink_to(digits / "few" / "train")
    held_out, _ = divide(open_split(str(digits / "few"), "train", num_classes=10), 0.5, seed=0)
    for index in range(held_out.images):
        image = Path(held_out.dataset.source[index][0])  # type: ignore[index]
        link = folder / "val" / image.parent.name / image.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    return folder


def calibrated(run: Path) -> Score:
    """The score of ``saq quantize --policy FOUND --epochs 0`` under the settings of the search in ``run``."""
    config = RunConfig.model_validate_json((run / "config.json").read_text())
    bits = {"bops": None, "policy": str(run / "policy.json")}
    section = config.quantization.model_copy(update=bits)
    config = config.model_copy(update={"quantization": section})
    network, images = prepare(config, torch.device("cpu"), SILENT)
    policy = given_policy(section, network)
    assert policy is not None
    statistics = calibrate(network, images, config, SILENT)
    model = install_quantizers(config, network, policy, statistics, images, SILENT)
    return score(model, images.validation(), "", torch.device("cpu"), SILENT)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("samq", ("--epochs", 1, *sets(**{"search.options.samq.warmup": 0, "search.options.samq.draws": 2}))),
        ("random", ("--correct-bias", *sets(**{"search.options.random.draws": 2}))),
        ("asga", ("--epochs", 1, "--no-recalibrate-bn")),
        pytest.param(
            "random",
            ("--weight-norm", "--no-recalibrate-bn", *sets(**{"search.options.random.draws": 2})),
            marks=pytest.mark.slow,
        ),
        ("error", ()),
    ],
)
def test_score_equals_calibrated_policy(
    method: str, options: tuple[object, ...], digits: Path, scoring: Path, tmp_path: Path
) -> None:
    """The same accuracy on the same images, and the same loss up to summation order."""
    network = (MODEL, *float_options(digits, scoring), "--batch-size", 32, "--workers", 0)
    found = answer(
        *("search", *network, "--budget", "w3a3", "--searcher", method, *options, "--run-dir", tmp_path),
        *("--pareto", 1, "--candidates", "2,4"),
    )

    expected = calibrated(tmp_path)
    front = json.loads((tmp_path / "pareto.json").read_text())
    (chosen,) = (point for point in front["points"] if point["kind"] == "chosen")
    assert front["images"] == 120
    assert chosen["top1"] == expected.top1
    assert chosen["loss"] == pytest.approx(expected.loss, rel=1e-5)
    if method != "error":  # which scores nothing itself
        assert (found["scoring_top1"], found["scoring_loss"]) == (chosen["top1"], chosen["loss"])


def test_quantize_without_epochs_matches_search_score(digits: Path, scoring: Path, tmp_path: Path) -> None:
    network = (MODEL, *float_options(digits, scoring), "--batch-size", 32, "--workers", 0)
    search = ("--budget", "w3a3", "--searcher", "random", *sets(**{"search.options.random.draws": 2}))
    found = answer("search", *network, *search, "--run-dir", tmp_path / "search")
    policy = tmp_path / "search" / "policy.json"
    run = answer(
        *("quantize", *network, "--policy", policy, "--epochs", 0, "--run-dir", tmp_path / "run"),
        "--no-export",
    )
    assert run["top1"] == run["calibrated_top1"] == found["scoring_top1"]
    assert run["images"] == 120


# Requests


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, TO_BE_TRAINED),
        ({"training.epochs": 0}, 1.0),
        ({"training.epochs": 0, "reconstruction.enabled": True}, TO_BE_TRAINED),
        ({"search.pareto": 3}, 1.0),
        ({"quantization.max_drop": 1.0}, 1.0),
        ({"quantization.min_top1": 70.0}, 1.0),
        ({"quantization.searcher": "asga"}, 1.0),
        ({"quantization.searcher": "samq"}, 1.0),
        ({"quantization.searcher": "uniform"}, 1.0),
        ({"search.pareto": 3, "search.weight_error": 0.5}, 0.5),
        ({"quantization.max_drop": 1.0, "search.weight_error": 0.5}, 0.5),
        ({"search.weight_error": 0.0}, 0.0),
        ({"search.weight_error": 1.0}, 1.0),
        ({"training.epochs": 0, "search.weight_error": 0.3}, 0.3),
    ],
)
def test_share_of_the_error_follows_what_comes_after(settings: dict[str, Any], share: float) -> None:
    config = resolve(options={"model.name": MODEL, "quantization.bops": "w4a4", **settings})
    assert weight_error_of(config) == share


def test_share_of_the_error_is_said_and_recorded(network: list[object], tmp_path: Path) -> None:
    """A search and the command that trains what it finds compare with half of it, and the whole is asked for."""
    budget = ("--budget", "w4a4", "--searcher", "error")
    plan = (*network[: -len(SMALL)], *budget, "--batch-size", 32, "--workers", 0, "--dry-run")
    assert answer("search", *network, *budget, "--dry-run")["weight_error"] == 0.5
    assert answer("quantize", *plan)["weight_error"] == 0.5
    assert answer("quantize", *plan, "--epochs", 0)["weight_error"] == 1
    result = saq("search", *network, *budget, "--run-dir", tmp_path / "half")
    assert "compared with 0.5 of the quantization error of weights" in result.stderr
    whole = answer("search", *network, *budget, "--weight-error", 1, "--run-dir", tmp_path / "whole")
    half = json.loads((tmp_path / "half" / "search.json").read_text())
    assert (half["weight_error"], whole["weight_error"]) == (0.5, 1.0)
    assert json.loads((tmp_path / "half" / "scores.json").read_text())["weight_error"] == 0.5

    def mean_bits(found: dict[str, Any], operand: str) -> float:
        return sum(bits[operand] for bits in found["policy"].values()) / len(found["policy"])

    assert mean_bits(half, "weight") < mean_bits(whole, "weight")
    assert mean_bits(half, "activation") > mean_bits(whole, "activation")


def test_pins_are_respected(network: list[object], tmp_path: Path) -> None:
    found = answer(
        *("search", *network, "--budget", "w4a4", *QUICK, "--run-dir", tmp_path / "run"),
        *(
            "--pin",
            "layer3.*=2",
            "--pin",
            "layer3.2.conv2=w5a7",
            "--pin",
            "layer1.*=4-6",
            "--pin",
            "linear=3-8",
        ),
    )
    policy = found["policy"]
    for name, bits in policy.items():
        if name == "layer3.2.conv2":
            assert bits == {"weight": 5, "activation": 7}
        elif name.startswith("layer3"):
            assert bits == {"weight": 2, "activation": 2}
        elif name.startswith("layer1"):
            assert set(bits.values()) <= {4, 5, 6}
    assert policy["conv1"] == {"weight": 8, "activation": 8}
    assert policy["linear"]["weight"] in (3, 4, 5, 6, 8)
    assert found["bops"] <= UNIFORM[4]


def test_budget_may_be_size_only(network: list[object], tmp_path: Path) -> None:
    found = answer("search", *network, "--size", "120KB", *QUICK, "--run-dir", tmp_path / "run")
    assert (found["budget_bops"], found["budget_bytes"]) == (None, 120_000)
    assert 0.985 * 120_000 <= found["size_bytes"] <= 120_000


@pytest.mark.parametrize(
    ("bops", "size"),
    sweep([("w3a3", "w8a8"), ("w8a8", "w3a3"), ("100M", "130KB")], lambda bops, _: bops != "100M"),
)
def test_two_budgets_hold_and_one_is_used(
    bops: str, size: str, network: list[object], tmp_path: Path
) -> None:
    given = ("--budget", bops, "--size", size, *QUICK, "--run-dir", tmp_path / "run")
    found = answer("search", *network, *given)
    used = (found["bops"] / found["budget_bops"], found["size_bytes"] / found["budget_bytes"])
    assert max(used) <= 1
    assert max(used) >= 0.985


def test_activation_candidates_are_separate(network: list[object], tmp_path: Path) -> None:
    found = answer(
        *("search", *network, "--budget", "w4a4", *QUICK, "--run-dir", tmp_path / "run"),
        *("--candidates", "2,4,8", "--activation-candidates", "3,5"),
    )
    free = [bits for name, bits in found["policy"].items() if name not in ("conv1", "linear")]
    assert {bits["weight"] for bits in free} <= {2, 4, 8}
    assert {bits["activation"] for bits in free} <= {3, 5}
    assert 0.985 * UNIFORM[4] <= found["bops"] <= UNIFORM[4]


def test_default_folder_name(network: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = answer("search", *network, "--budget", "95M", "--searcher", "uniform")
    assert Path(found["run_dir"]) == Path("runs/resnet20-95m-uniform")
    assert found["bops"] == UNIFORM[3]


def test_search_classes_are_sampled(network: list[object], tmp_path: Path) -> None:
    found = answer(
        *("search", *network, "--budget", "w3a3", "--search-classes", 3, "--pareto", 2),
        *("--scoring-images", 36, "--searcher", "random", *FAST["random"]),
        *("--run-dir", tmp_path / "run"),
    )
    assert found["bops"] <= UNIFORM[3]
    assert json.loads((tmp_path / "run" / "pareto.json").read_text())["images"] == 36


def test_proxy_policy_fits_another_network(digits: Path, tmp_path: Path) -> None:
    """The target has 100 classes and 32-pixel images; its images and weights do not exist here."""
    target = [
        *(MODEL, "--num-classes", 100, "--in-chans", 1, "--input-size", 32, "--mean", 0.305, "--std", 0.376)
    ]
    weights = digits / "float.safetensors"
    found = answer(
        *("search", *target, "--data", digits / "images", *SMALL, "--budget", "w4a4", "--searcher", "random"),
        *("--set", "search.options.random.draws=2", "--run-dir", tmp_path / "run"),
        *("--proxy", f"num_classes=10,input_size=16,weights={weights}"),
    )
    shown = answer("profile", *target[:7], "--policy", tmp_path / "run" / "policy.json")
    uniform = answer("profile", *target[:7], "--bits", 4)
    assert found["bops"] == shown["bops"]
    assert found["budget_bops"] == uniform["bops"]
    assert 0.985 * uniform["bops"] <= found["bops"] <= uniform["bops"]
    assert found["scoring_top1"] > 40  # the proxy's weights are trained


def test_proxy_without_weights_is_trained_first(digits: Path, tmp_path: Path) -> None:
    result = saq(
        *("search", MODEL, "--num-classes", 100, "--in-chans", 1, "--input-size", 32, "--no-pretrained"),
        *("--mean", 0.305, "--std", 0.376, "--data", digits / "few", *SMALL, "--budget", "w4a4"),
        *("--proxy", "input_size=16", "--searcher", "random", *FAST["random"], "--run-dir", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.stderr
    assert "proxy: training top-1" in result.stderr


# Refusals


def test_unreachable_budget_names_the_range(network: list[object], tmp_path: Path) -> None:
    for method in SEARCHERS:
        result = saq(
            "search", *network, "--budget", "1M", "--searcher", method, "--run-dir", tmp_path / "run"
        )
        assert result.exit_code == 4
        assert "reachable: 42.51 M to 644.1 MBOPs" in last_error(result)
        assert not (tmp_path / "run").exists()


def test_unreachable_size_names_the_range(network: list[object], tmp_path: Path) -> None:
    result = saq("search", *network, "--budget", "w4a4", "--size", "1KB", "--run-dir", tmp_path / "run")
    assert result.exit_code == 4
    assert "meets 1 KB" in last_error(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "w4a4", "--searcher", "magic"], "choose from samq"),
        (["--budget", "w4a4", "--searcher", "error", "--epochs", 3], "does not train"),
        (["--budget", "w4a4", "--searcher", "error", "--rho", 0.1], "it has no options"),
        (
            ["--budget", "w4a4", "--searcher", "error", "--set", "search.options.error.draws=3"],
            "it has no options",
        ),
        (
            ["--budget", "w4a4", "--searcher", "samq", "--set", "search.options.samq.x=3"],
            "has no x: its options are epochs",
        ),
        (["--budget", "w4a4", "--set", "search.options.magic.draws=3"], "belongs to no searcher"),
        (["--budget", "w4a4", "--searcher", "samq", "--set", "search.options.samq.prior=x"], "prior"),
        (["--budget", "w4a4", "--searcher", "samq", "--set", "search.options.samq.draws=0"], "draws"),
        (
            ["--budget", "w4a4", "--searcher", "samq", "--set", "search.options.samq.sharpness=False"],
            "true or",
        ),
        (["--budget", "w4a4", "--searcher", "samq", "--epochs", 0.5], "whole number"),
        (["--budget", "w4a4", "--searcher", "asga", "--weight-error", 0.5], "counts the whole error"),
        (["--budget", "w4a4", "--searcher", "uniform", "--weight-error", 0.5], "or choose from hawq"),
        (["--budget", "w4a4", "--weight-error", 1.5], "less than or equal to 1"),
        (["--budget", "w4a4", "--searcher", "hawq", "--set", "search.options.hawq.samples=0"], "samples"),
        (["--budget", "w4a4", "--searcher", "samq", "--set", "search.optimizer=nope"], "nope"),
        (["--budget", "w9a9"], "--budget w9a9"),
        ([], "no budget was given"),
        (["--budget", "34"], "unit"),
        (["--size", "small"], "small"),
        (["--budget", "w4a4", "--set", "quantization.policy=p.json"], "nothing to search"),
        (["--budget", "w4a4", "--set", "quantization.bits=w4a4"], "nothing to search"),
        (["--budget", "w4a4", "--pin", "layer1"], "PATTERN=BITS"),
        (["--budget", "w4a4", "--pin", "layer9.*=4"], "matches no layer"),
        (["--budget", "w4a4", "--pin", "layer1.*=9"], "from 2 to 8"),
        (["--budget", "w4a4", "--pin", "layer1.*=x"], "not a bit-width"),
        (["--budget", "w4a4", "--candidates", "2,9"], "--candidates"),
        (["--budget", "w4a4", "--activation-candidates", "1"], "1"),
        (["--budget", "w4a4", "--proxy", "images"], "--proxy"),
        (["--budget", "w4a4", "--proxy", "size=3"], "size"),
        (["--resume"], "no run to resume"),
    ],
)
def test_impossible_search_is_one_line_error(
    options: list[object], says: str, network: list[object], tmp_path: Path
) -> None:
    given = network if options != ["--resume"] else []
    result = saq("search", *given, *options, "--run-dir", tmp_path / "run", "--quiet")
    assert result.exit_code == 1, result.stdout
    assert says in last_error(result)
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_policy_is_not_a_search_option(network: list[object]) -> None:
    assert saq("search", *network, "--policy", "p.json").exit_code == 2


def test_missing_data_is_refused_before_loading(tmp_path: Path) -> None:
    result = saq("search", MODEL, "--budget", "w4a4", "--run-dir", tmp_path / "run")
    assert result.exit_code == 1
    assert "--data" in last_error(result)


def test_tied_layers_cannot_be_pinned_apart(network: list[object], tmp_path: Path) -> None:
    """Uses another network, since this one ties nothing."""
    result = saq(
        *("search", "saq/preresnet20", *network[3:], "--budget", "w4a4", "--run-dir", tmp_path / "run"),
        *("--pin", "layer2.0.conv2=4", "--pin", "layer2.0.shortcut=8", "--quiet", "--no-pretrained"),
    )
    assert result.exit_code == 1
    assert "share their bits" in last_error(result)


# Run directories


def test_finished_search_is_not_overwritten(
    plain: tuple[Path, dict[str, Any]], network: list[object]
) -> None:
    path, _ = plain
    before = {item: item.stat().st_mtime_ns for item in path.iterdir()}
    result = saq("search", *network, "--budget", "w4a4", "--run-dir", path)
    assert result.exit_code == 1
    for part in ("--resume", "--overwrite"):
        assert part in last_error(result)
    assert {item: item.stat().st_mtime_ns for item in path.iterdir()} == before


def test_resume_of_finished_search_prints_it(plain: tuple[Path, dict[str, Any]]) -> None:
    path, found = plain
    assert answer("search", "--run-dir", path, "--resume") == found


def test_resume_with_another_budget_is_refused(plain: tuple[Path, dict[str, Any]]) -> None:
    path, _ = plain
    result = saq("search", "--run-dir", path, "--resume", "--budget", "w4a4")
    assert result.exit_code == 1
    assert "quantization.bops: w3a3 -> w4a4" in last_error(result)


def test_refused_search_keeps_the_previous_one(network: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    quick = (*network, "--searcher", "uniform", "--run-dir", run)
    answer("search", *quick, "--budget", "w3a3")
    own = run / "policy.edited.json"
    own.write_text((run / "policy.json").read_text())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for options in (["--budget", "1K"], ["--budget", "w4a4", "--pin", "nothing*=4"]):
        assert saq("search", *quick, *options, "--overwrite").exit_code
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    answer("search", *quick, "--budget", "w4a4", "--overwrite")
    assert own.read_bytes() == before[own]


def test_quantize_cannot_resume_a_search(
    plain: tuple[Path, dict[str, Any]],
) -> None:
    result = saq("quantize", "--run-dir", plain[0], "--resume")
    assert result.exit_code == 1
    assert "saq search" in last_error(result)


def test_dry_run_writes_nothing(network: list[object], tmp_path: Path) -> None:
    options = ["--budget", "w4a4", "--pin", "layer1.*=4-8", "--activation-candidates", "4,8", "--dry-run"]
    plan = answer("search", *network, *options, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert plan["budget_bops"] == UNIFORM[4]
    assert UNIFORM[2] < plan["profile"]["floor_bops"] < UNIFORM[4]
    assert 0 < plan["profile"]["floor_size_bytes"] < plan["profile"]["ceiling_size_bytes"]


def test_overwrite_removes_the_previous_search(
    plain: tuple[Path, dict[str, Any]], network: list[object], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(plain[0], path)
    found = answer("search", *network, "--budget", "w4a4", *QUICK, "--run-dir", path, "--overwrite")
    assert found["budget_bops"] == UNIFORM[4]
    assert not list(path.glob("pareto.*"))
    assert json.loads((path / "policy.json").read_text())["layers"] == found["policy"]
