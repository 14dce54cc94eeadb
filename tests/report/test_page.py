"""The page of a run is complete in itself, says what the files of the run hold, and escapes what comes from it."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import saqcli
from saqcli.data.datasets import Split
from saqcli.data.images import ImageSet
from saqcli.errors import ConfigError, RunDirectoryError
from saqcli.report.answers import MOST_SHOWN, Answers, write_answers
from saqcli.report.page.contents import VerdictFile, read_run
from saqcli.report.page.page import page_of, write_page
from saqcli.report.page.proofs import proof_of
from saqcli.report.page.svg import Scale, spread
from saqcli.runs.directory import RunDirectory
from tests.support.command_line import answer, last_error, saq
from tests.support.reported import make_runs

PARTS = ("stages", "bits", "training", "front", "layers", "analysis", "answers", "proof", "deploy", "repeat")


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    make_runs(digits, folder)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the quantization, to be changed."""
    return shutil.copytree(runs / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))


def parts(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', text)


def change(path: Path, **values: Any) -> None:
    tree = json.loads(path.read_text())
    tree.update(values)
    path.write_text(json.dumps(tree))


def test_commands_write_the_page(runs: Path) -> None:
    for name in ("run", "search"):
        assert (runs / name / "report.html").read_text() == page_of([runs / name])


def test_page_has_every_part(runs: Path) -> None:
    assert parts((runs / "run" / "report.html").read_text()) == list(PARTS)
    assert parts((runs / "search" / "report.html").read_text()) == ["bits", "front", "layers", "repeat"]


def test_page_is_small_and_names_no_address(runs: Path) -> None:
    text = (runs / "run" / "report.html").read_text()

    assert len(text.encode()) < 1_000_000
    links = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert not re.search(r"https?:|@import|url\(", text)


def test_page_says_what_the_run_found(runs: Path) -> None:
    text, results = (
        (runs / "run" / "report.html").read_text(),
        RunDirectory.open(runs / "run").manifest().results,
    )

    for key in ("float_top1", "top1", "calibrated_top1"):
        assert f"{results[key]:.2f} %" in text
    for name in results["policy"]:
        assert f">{name}</th>" in text
    for style in ("qdq", "exact", "trt", "qonnx"):
        assert f"style {style}," in text
    assert "trtexec --onnx=" in text
    assert "ConvertQONNXtoFINN" in text


def test_older_run_lacks_parts_only(run: Path) -> None:
    for name in (
        "network.json",
        "answers.json",
        "metrics.jsonl",
        "scores.json",
        "pareto.json",
        "search.json",
    ):
        (run / name).unlink()
    shutil.rmtree(run / "analysis")
    for path in (run / "artifacts").glob("*.verdict.json"):
        path.unlink()

    assert parts(page_of([run])) == ["stages", "bits", "layers", "repeat"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("network.json", {"layers": [{"name": "conv1"}]}),
        ("answers.json", {"schema_version": 2}),
        ("analysis/sharpness.json", {"reading": {}}),
        ("artifacts/model.verdict.json", {"images": "many"}),
    ],
)
def test_damaged_file_is_named(run: Path, name: str, values: dict[str, Any]) -> None:
    change(run / name, **values)

    result = saq("report", run, "--json")

    assert result.exit_code == 1
    assert f"{run / name}" in last_error(result)


def test_names_from_a_run_are_escaped(run: Path) -> None:
    evil = '"><script>alert(1)</script>'
    manifest = json.loads((run / "manifest.json").read_text())
    change(
        run / "manifest.json",
        results=manifest["results"] | {"model": evil, "advice": evil},
        command=["saq", evil],
    )
    answers = json.loads((run / "answers.json").read_text())
    classes = [row | {"name": evil, "right": 0, "float_right": 1} for row in answers["classes"]]
    shown = [row | {"label": evil, "before": evil, "after": evil} for row in answers["shown"]]
    change(run / "answers.json", classes=classes, shown=shown)
    network = json.loads((run / "network.json").read_text())
    change(run / "network.json", layers=[row | {"kind": evil} for row in network["layers"]])

    text = page_of([run])

    assert evil not in text
    assert "alert(1)" in text
    assert text.count("<script>") == 1


def test_picture_in_the_answers_must_be_base64(run: Path) -> None:
    answers = json.loads((run / "answers.json").read_text())
    image = {
        "place": 0,
        "label": "1",
        "before": "1",
        "after": "2",
        "pixels": 9,
        "jpeg": '" onerror="alert(1)',
    }
    change(run / "answers.json", shown=[image], changed=max(1, answers["changed"]))

    with pytest.raises(RunDirectoryError, match=r"shown\.0\.jpeg"):
        page_of([run])


def test_damaged_analysis_does_not_fail_analyze(run: Path, digits: Path) -> None:
    change(run / "network.json", layers=3)

    options = ("--images", 10, "--data", digits / "few", "--workers", 0)
    found = answer("analyze", run, "--sharpness", "--overwrite", *options)

    assert found["page"] is None


def test_analysis_of_a_file_has_a_page_of_its_own(run: Path, digits: Path, tmp_path: Path) -> None:
    file, out = run / "artifacts" / "model.safetensors", tmp_path / "readings"
    answer(
        "analyze", file, "--sharpness", "--images", 10, "--data", digits / "few", "--out", out, "--workers", 0
    )

    assert parts((out / "report.html").read_text()) == ["analysis"]
    assert answer("report", out) == {"page": str(out / "report.html"), "runs": [str(out)]}


def test_unfinished_run_is_refused(run: Path) -> None:
    change(run / "manifest.json", status="interrupted")

    error = last_error(saq("report", run, "--json"))

    assert f"{run} was interrupted, so there is nothing to report: resume with" in error


def test_folder_without_run_is_refused(tmp_path: Path) -> None:
    assert "is not a run directory" in last_error(saq("report", tmp_path, "--json"))


def test_same_run_twice_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        page_of([run, run.parent / "." / run.name])


def test_only_pages_are_replaced(run: Path, tmp_path: Path) -> None:
    page, notes = tmp_path / "page.html", tmp_path / "notes.html"
    notes.write_text("mine")

    assert write_page([run], page) == write_page([run], page) == page
    with pytest.raises(ConfigError, match="is no page that saq wrote"):
        write_page([run], notes)
    with pytest.raises(ConfigError, match="is a folder"):
        write_page([run], tmp_path)
    assert notes.read_text() == "mine"


def test_several_runs_are_compared(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"

    answer("report", runs / "run", runs / "search", "--out", page)

    text = page.read_text()
    policies = [read_run(runs / name).policy for name in ("run", "search")]
    differ = [name for name in policies[0] if policies[0][name] != policies[1][name]]
    assert differ
    assert re.findall(r'<tr><th scope="row">([^<]*)</th><td data-value', text) == differ


def test_runs_on_other_images_are_not_ranked(runs: Path, run: Path) -> None:
    same = page_of([runs / "run", run])
    images = json.loads((run / "manifest.json").read_text())["images"]
    change(run / "manifest.json", images=images | {"val": "9:" + "0" * 64})
    other = page_of([runs / "run", run])

    assert "is best:" in same
    assert "is best:" not in other
    assert "were not scored on the same images" in other


def snippet(text: str, head: str) -> str:
    match = re.search(rf"<h3>{re.escape(head)}</h3>\s*<pre>(.*?)</pre>", text, re.DOTALL)
    assert match
    return html.unescape(match[1])


@pytest.mark.parametrize("file", ["model.onnx", "model-exact.onnx"])
def test_code_for_onnx_runtime_runs(
    runs: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    image = sorted((digits / "few" / "val" / "3").iterdir())[0]
    Image.open(image).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    code = snippet(page_of([runs / "run"]), f"{file} in ONNX Runtime").replace("photo.jpg", "photo.png")

    exec(code, {})

    shown, logit = capsys.readouterr().out.split()
    model = saqcli.load(runs / "run")
    mean, std = (float(saqcli.info(runs / "run").preprocessing[key][0]) for key in ("mean", "std"))
    pixels = np.asarray(Image.open(image).convert("L"), np.float32)[None, None] / 255
    with torch.no_grad():
        logits = model(torch.from_numpy((pixels - mean) / std))[0]
    assert int(shown) == int(logits.argmax())
    assert float(logit) == pytest.approx(float(logits.max()), rel=0.02)


def test_code_for_python_loads_the_network(runs: Path) -> None:
    text = html.unescape(page_of([runs / "run"]))
    code = re.search(r"<pre>(import saqcli as saq.*?)</pre>", text, re.DOTALL)
    assert code
    names: dict[str, Any] = {}

    exec(code[1], names)

    assert isinstance(names["model"], torch.nn.Module)


@pytest.fixture
def written(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def split_of(count: int) -> Split:
    source = [(Image.new("RGB", (40 + place, 20), (place, 0, 0)), place % 3) for place in range(count)]
    return Split("images", ImageSet(source, None, 3, "images"), ("cat", "", "dog"))


def read_answers(run: RunDirectory) -> Answers:
    return Answers.model_validate_json(run.answers_path.read_text())


def test_answers_are_counted(written: RunDirectory) -> None:
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    before, after = torch.tensor([0, 0, 2, 0, 2]), torch.tensor([1, 1, 2, 0, 0])

    write_answers(written, split_of(6), labels, before, after, labelled=True)

    found = read_answers(written)
    assert (found.images, found.changed, found.lost, found.won) == (5, 3, 1, 1)
    assert [(row.name, row.images, row.float_right, row.right) for row in found.classes] == [
        ("cat", 2, 2, 1),
        ("class 1", 2, 0, 1),
        ("dog", 1, 1, 1),
    ]
    assert [(one.place, one.label, one.before, one.after) for one in found.shown] == [
        (0, "cat", "cat", "class 1"),
        (1, "class 1", "cat", "class 1"),
        (5, "class 1", "dog", "cat"),
    ]
    assert [one.pixels for one in found.shown] == [40, 41, 45]


def test_answers_without_labels(written: RunDirectory) -> None:
    labels, before, after = torch.tensor([[0, 0, 0], [0, 1, 2], [0, 2, 2]])

    write_answers(written, split_of(3), labels, before, after, labelled=False)

    found = read_answers(written)
    assert (found.changed, found.lost, found.won, found.classes) == (1, None, None, [])
    assert [(one.place, one.label) for one in found.shown] == [(1, None)]


def test_shown_images_are_few_and_of_all_classes(written: RunDirectory) -> None:
    labels = torch.arange(120) % 3

    write_answers(written, split_of(120), labels, labels, (labels + 1) % 3, labelled=True)

    found = read_answers(written)
    assert found.changed == found.lost == 120
    assert len(found.shown) == MOST_SHOWN
    assert {one.label for one in found.shown} == {"cat", "class 1", "dog"}


def test_answers_of_other_images_are_not_written(written: RunDirectory) -> None:
    write_answers(written, split_of(3), torch.zeros(3), torch.zeros(2), torch.zeros(3), labelled=True)

    assert not written.answers_path.exists()


VERDICT = {
    "schema_version": 1, "file": "model.onnx", "sha256": "a" * 64, "size_bytes": 1000, "style": "qdq", "verified": True,
    "verified_on": "images", "images": 40, "images_available": 60, "argmax_agreement": 0.975, "max_abs_diff": 0.5,
    "pytorch_max_abs_diff": 0.25, "layers": 3, "layers_error": 1e-6, "codes": 1234, "flipped_codes": 2,
}  # fmt: skip


def claims(**values: Any) -> dict[str, str]:
    proof = proof_of(VerdictFile.model_validate(VERDICT | values))
    return {claim.head: claim.text for claim in proof.claims}


def test_proof_of_layers_and_ends() -> None:
    found = claims()

    assert found["Layer by layer"].startswith("Each of its 3 layers, fed the codes that PyTorch feeds it,")
    assert found["Layer by layer"].endswith("2 of 1,234 codes rounded the other way.")
    assert "in double precision on 97.50 % of 40 images of 60." in found["End to end"]


def test_proof_of_equal_bits() -> None:
    assert set(claims(style="exact", max_abs_diff=0.0)) == {"Bit for bit"}
    assert claims(style="exact", max_abs_diff=0.0)["Bit for bit"].startswith("Every logit equals")
    assert "differ" in claims(style="exact")["Bit for bit"]


def test_proof_names_twin_and_conditions() -> None:
    found = claims(twin={"equal": True, "skipped": None}, conditions=["needs a processor with VNNI"])

    assert found["In ONNX Runtime"] == "Integer kernels returned, bit by bit, what their arithmetic predicts."
    assert found["Condition"] == "Needs a processor with VNNI."
    assert "In ONNX Runtime" not in claims(twin={"equal": False, "skipped": "too large"})


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 10, 0, 100), [0, 2, 4, 6, 8, 10]),
        (Scale(97.8, 99.9, 0, 100), [98, 98.5, 99, 99.5]),
        (Scale(1e6, 1e9, 0, 100, log=True), [1e6, 1e7, 1e8, 1e9]),
        (Scale(2e6, 8e6, 0, 100, log=True), [2e6, 3e6, 5e6, 7e6]),
    ],
)
def test_ticks_are_round(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks() == pytest.approx(ticks)


def test_scale_of_equal_values_has_a_range() -> None:
    scale = spread([3.0, 3.0], 100, 0)

    assert scale(3.0) == pytest.approx(50)
    assert spread([3.0], 0, 100, log=True)(3.0) == pytest.approx(50)
