"""Everything missing or mistyped is reported in one message, before anything is downloaded, loaded or written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli.config import resolve
from saqcli.errors import ConfigError, Problems, SeveralProblems, UnknownModel
from saqcli.models import libraries
from saqcli.models.load import build_architecture
from saqcli.pipelines import rerun
from tests.support.command_line import answer, last_error, saq

DATA = "no images given: use --data DIR"
TINY = {"name": "saq/resnet20", "num_classes": 10, "in_chans": 3, "kwargs": {}}
UNPUBLISHED = "saq/resnet20 has no published weights: use --weights FILE"
BITS = "no bits and no budget were given: give exactly one of --bits 4, --bops 34G"


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: Any) -> None:
        raise AssertionError("published weights were asked for")

    monkeypatch.setattr(libraries.Timm, "fetch", fetched)
    monkeypatch.setattr(libraries, "require_repository", lambda *_: None)  # they could be fetched


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("quantize resnet18 --bops 34G", [DATA]),
        ("quantize resnet18", [DATA, BITS]),
        ("quantize", ["no model was named", DATA, BITS]),
        (
            "quantize resnet18 --method sqa --searcher samp --recipe quik --device cuda:9 --optimizer sdg "
            "--quantizer clop --set training.schedule=cosin",
            [
                *(DATA, BITS, "no method 'sqa'", "no searcher 'samp'", "no recipe 'quik'", "--device cuda:9"),
                *("optimizer 'sdg'", "no quantizer 'clop'", "schedule 'cosin'"),
            ],
        ),
        (
            "quantize resnt18 --bits 9 --bops 34 --size 5GBOPs --data nosuch --candidates 1,2 --lr -1 "
            "--input-size abc --mean x --pin fc --set training.speed=1 --set foo --weights nosuch.pth",
            [
                *(
                    "did you mean timm/resnet18",
                    "--bits and --bops or --size were given",
                    "--bits 9",
                    "'34' is not a",
                ),
                *(
                    "use --bops 5GBOPs",
                    "no folder nosuch",
                    "--candidates 1,2",
                    "training.lr",
                    "--input-size abc",
                ),
                *("--mean x", "--pin fc", "unknown key 'training.speed'", "--set foo", "weights nosuch.pth"),
            ],
        ),
        ("quantize timm/test_vit --bits 4 --input-size 33", [DATA, "33"]),
        (
            "quantize saq/resnet20 --bits 4 --model-kwargs nosuch=1",
            [DATA, UNPUBLISHED, "no argument 'nosuch'"],
        ),
        (
            "quantize saq/resnet20 --policy nosuch.json",
            [DATA, UNPUBLISHED, "nosuch.json cannot be read"],
        ),
        (
            "search resnet18 --searcher samp --device cuda:9",
            [DATA, "no budget was given: use --budget 34G", "no searcher 'samp'", "--device cuda:9"],
        ),
        ("search resnt18 --budget 500MB", [DATA, "did you mean", "use --size 500MB, or 500M"]),
        ("eval resnet18", [DATA]),
        ("eval resnt18 --device cuda:9", ["did you mean timm/resnet18", DATA, "--device cuda:9"]),
        (
            "eval resnet18 --bench --threads 0 --batch-sizes x --data nosuch",
            ["--batch-sizes x", "no folder nosuch"],
        ),
        ("analyze resnet18 --split test --grid 4", ["give --bits 4", DATA, "--grid 4"]),
        (
            "analyze resnt18 --bits 9 --against nosuch",
            ["did you mean", "--bits 9", "directory or file nosuch", DATA],
        ),
        (
            "export nosuch --onnx x --style qqd --verify foo --data nosuch",
            ["directory or file nosuch", "--onnx x", "style 'qqd'", "--verify foo", "no folder nosuch"],
        ),
        (
            "profile resnt18 --bits 9 --policy x.json",
            ["did you mean", "--bits 9", "give one of them", "x.json"],
        ),
    ],
)
def test_all_problems_are_reported_together(
    command: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = saq(*command.split())

    assert result.exit_code == 1
    line = last_error(result)
    for text in says:
        assert text in line
    assert len(result.stderr.splitlines()) == 1
    count = f"{len(says)} problems: (1) "
    assert line.startswith(f"error: {count}" if len(says) > 1 else f"error: {says[0]}"), line
    assert not list(tmp_path.iterdir())


def test_everything_missing_offline_is_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(libraries, "require_repository", unreachable)

    line = last_error(saq("quantize", "resnet18", "--bops", "34G"))

    assert line == (
        f"error: 2 problems: (1) {DATA} with train/ and val/, one folder per class in each, or without labels and "
        "training --calibration PHOTOS --recipe minutes with any folder of images; (2) the pretrained weights of "
        "timm/resnet18 could not be fetched (no route to host): use --weights FILE with a local .safetensors "
        "or .pth, or --no-pretrained"
    )


def test_run_directory_is_checked_last(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").touch()
    given = ("quantize", "resnet18", "--data", images, "--bits", 4, "--run-dir", run)

    mistyped = last_error(saq(*given, "--method", "sqa"))
    assert "no method 'sqa'" in mistyped
    assert str(run) not in mistyped
    assert f"{run} holds other files and no run" in last_error(saq(*given))
    exported = tmp_path / "model.onnx"
    exported.touch()
    assert "already exists" not in last_error(saq("export", "nosuch", "--onnx", exported))


def test_budgets_are_validated_everywhere(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    base = ("quantize", "saq/resnet20", "--no-pretrained", "--dry-run")
    for text, says in (
        ('bops = "500MB"', "use --size 500MB, or 500M for bit-operations"),
        ('size = "34GBOPs"', "use --bops 34GBOPs, or 34G for bytes"),
        ("bops = 500", "'500' is not a budget: add a unit"),
        ("size = 5.5", "'5.5' is not a size: add a unit"),
        ('bops = "20ms"', "is a time"),
    ):
        file.write_text(f"[quantization]\n{text}\n")
        assert says in last_error(saq(*base, "--config", file))
        key, _, value = text.partition(" = ")
        assert says in last_error(saq(*base, "--set", f"quantization.{key}={value}"))
        assert says.replace("--bops", "--budget") in last_error(
            saq("search", "saq/resnet20", "--data", images, "--set", f"quantization.{key}={value}")
        )
    file.write_text('[quantization]\nbits = 4\n[quantization.pins]\n"*.conv2" = 6\n')
    plan = answer(*base, "--config", file)
    bits = {row["name"]: row["weight_bits"] for row in plan["profile"]["layers"]}
    assert [bits[name] for name in ("conv1", "layer1.0.conv1", "layer1.0.conv2")] == [8, 4, 6]


def test_demo_checks_budget_before_training(tmp_path: Path) -> None:
    for budget, code, says in (
        ("500MB", 1, "use `saq quantize --size 500MB`, or 500M"),
        ("5mJ", 1, "is an energy"),
        ("1M", 4, "reachable: 42.51 M"),
    ):
        result = saq("demo", "--run-dir", tmp_path / "demo", "--bops", budget)
        assert result.exit_code == code
        assert says in last_error(result)
        assert not list(tmp_path.iterdir())


def test_problems_are_unique_and_ordered() -> None:
    problems = Problems()
    problems.check()
    assert problems.attempt(int, "3") == 3

    def wrong() -> None:
        raise UnknownModel("one")

    assert problems.attempt(wrong) is None
    with pytest.raises(UnknownModel, match=r"^one$"):
        problems.check()
    problems.add(SeveralProblems([ConfigError("two"), UnknownModel("one")]))
    with pytest.raises(SeveralProblems, match=r"^2 problems: \(1\) one; \(2\) two$") as raised:
        problems.check()
    assert raised.value.exit_code == 1


def test_resume_needs_no_weights_or_policy(tmp_path: Path, images: Path) -> None:
    """Files read only once may be gone; the settings of the run may not."""
    config = tmp_path / "config.json"
    plan = answer("quantize", "saq/resnet20", "--no-pretrained", "--bits", 4, "--dry-run")["config"]
    plan["model"]["weights"] = "gone.pth"
    plan["data"]["path"] = str(images)
    config.write_text(json.dumps(plan))
    from saqcli.config import resolve
    from saqcli.pipelines.checks import check_quantize

    check_quantize(resolve(file=config), images=True, files=False)
    with pytest.raises(ConfigError, match=r"weights gone\.pth cannot be read: it does not exist"):
        check_quantize(resolve(file=config), images=True)


def test_weights_key_causes_no_second_error(tmp_path: Path) -> None:
    """Without weights the network is built only to find further problems, and the key is not needed."""
    weights = tmp_path / "five.pth"
    torch.save({"model": build_architecture(TINY).state_dict(), "other": {}}, weights)
    result = saq("quantize", "saq/resnet20", "--weights", weights, "--weights-key", "model", "--bits", 4)
    assert result.exit_code == 1
    assert last_error(result).startswith(f"error: {DATA}")


def test_dry_search_is_checked_as_search() -> None:
    result = saq("search", "saq/resnet20", "--mean", "abc", "--dry-run", "--no-pretrained")
    assert "no budget was given: use --budget 34G" in last_error(result)
    assert "--bits" not in last_error(result)


def test_policy_folder_is_not_weights(tmp_path: Path) -> None:
    (tmp_path / "some.safetensors").touch()
    result = saq("profile", "saq/resnet20", "--policy", tmp_path)
    assert "is not a run directory" in last_error(result)
    assert "some.safetensors" not in last_error(result)


def test_attention_option_on_a_file_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "some.safetensors").touch()
    result = saq("profile", file, "--quantize-attention")
    assert result.exit_code == 1
    assert last_error(result).endswith("has its own attention: remove --quantize-attention")


def test_rerun_workers_need_no_weights() -> None:
    named = {"model.name": "saq/resnet20", "model.weights": "gone.pth", "model.weights_key": "model"}
    assert rerun._default_workers(resolve(options=named), 1) in (0, 1)
