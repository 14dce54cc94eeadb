"""saq search --from: a search solved again for another budget from the scores that its run kept."""

import json
from pathlib import Path

import pytest

from saqcli.serialization import json_text
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options


def options(digits: Path, *more: object) -> tuple[object, ...]:
    return (MODEL, *float_options(digits, digits / "few"), "--batch-size", 32, "--workers", 0, *more)


@pytest.fixture(scope="module")
def kept(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("again") / "run"
    answer("search", *options(digits, "--budget", "w4a4", "--searcher", "error", "--run-dir", run))
    return run


def test_same_result_as_a_new_search(kept: Path, digits: Path, tmp_path: Path) -> None:
    searched = answer(
        "search",
        *options(
            digits, "--budget", "w3a3", "--size", "w4a4", "--searcher", "error", "--run-dir", tmp_path / "new"
        ),
    )
    again = answer(
        "search", "--from", kept, "--budget", "w3a3", "--size", "w4a4", "--run-dir", tmp_path / "again"
    )

    same = ("model", "searcher", "policy", "layers", "bops", "size_bytes", "budget_bops", "budget_bytes")
    assert {key: again[key] for key in same} == {key: searched[key] for key in same}
    for name in ("policy.json", "scores.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    scores = json.loads((kept / "scores.json").read_text())
    assert list(scores) == ["schema_version", "saq_version", "model", "searcher", "weight_error", "losses"]
    third = answer("search", "--from", tmp_path / "again", "--size", "w2a2", "--run-dir", tmp_path / "third")
    assert (third["budget_bops"], third["size_bytes"] < again["size_bytes"]) == (None, True)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_scores_keep_their_share_of_the_error(share: float, digits: Path, tmp_path: Path) -> None:
    """Searched again, and the result repeated, with the share that was measured, whatever the default."""
    budget = ("--budget", "w3a3", "--searcher", "error", "--weight-error", share)
    first = answer("search", *options(digits, *budget, "--run-dir", tmp_path / "first"))
    again = answer(
        "search", "--from", tmp_path / "first", "--budget", "w3a3", "--run-dir", tmp_path / "again"
    )
    assert again["policy"] == first["policy"]
    assert again["weight_error"] == first["weight_error"] == share
    assert json.loads((tmp_path / "again" / "scores.json").read_text())["weight_error"] == share
    repeated = answer("rerun", tmp_path / "again", "--run-dir", tmp_path / "repeated")
    assert repeated["identical"]


def test_other_costs_and_fewer_candidates(kept: Path, tmp_path: Path) -> None:
    layers = json.loads((kept / "policy.json").read_text())["layers"]
    table = tmp_path / "costs.json"
    costs = {name: {"w8a8": 2.0, "w4a8": 1.0} for name in layers}
    table.write_text(json_text({"schema_version": 1, "unit": "ms", "layers": costs}))
    budget = f"{2 * len(layers) - 3}ms"
    options = ("--cost", table, "--budget", budget, "--candidates", "4,8")
    found = answer("search", "--from", kept, *options, "--run-dir", tmp_path / "run")

    assert found["cost"] <= found["budget_cost"] == (2 * len(layers) - 3) * 10**9
    assert {bits["weight"] for bits in found["policy"].values()} <= {4, 8}


def test_what_cannot_be_solved_again(kept: Path, digits: Path, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        return last_error(saq("search", *arguments, "--run-dir", tmp_path / "other"))

    uniform = tmp_path / "uniform"
    answer("search", *options(digits, "--budget", "w4a4", "--searcher", "uniform", "--run-dir", uniform))

    assert "searcher uniform may have none" in error("--from", uniform, "--budget", "w2a2")
    assert "no budget was given" in error("--from", kept)
    assert "other --quantizer, --seed" in error(
        "--from", kept, "--budget", "w4a4", "--quantizer", "lsq", "--seed", 3
    )
    assert "did not measure layer" in error("--from", kept, "--budget", "w4a4", "--candidates", "4,7")
    assert "with --weight-error 0.5: remove --weight-error 1" in error(
        "--from", kept, "--budget", "w4a4", "--weight-error", 1
    )
    assert "is measured on images" in error("--from", kept, "--budget", "w4a4", "--max-drop", 1)
    assert "remove MODEL" in error(MODEL, "--from", kept, "--budget", "w4a4")
    assert "no configuration of" in error("--from", kept, "--budget", "1K")
    (tmp_path / "damaged").mkdir()
    for path in kept.iterdir():
        if path.is_file():
            (tmp_path / "damaged" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "damaged" / "scores.json").write_text('{"schema_version": 2}')
    assert "its schema_version is 2" in error("--from", tmp_path / "damaged", "--budget", "w4a4")
