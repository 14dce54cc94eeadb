"""The page of a run says what its files hold, escapes what comes from them, and is complete in itself.

In a browser, on a phone and on a screen, in both color schemes: nothing overflows, and all text can be read.
"""

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import saqcli
from saqcli.errors import ConfigError, RunDirectoryError
from saqcli.report.comparison import Record
from saqcli.report.page.contents import read_run
from saqcli.report.page.page import page_of, write_page
from saqcli.runs.directory import RunDirectory
from tests.support.browser import CHROMIUM, look_at
from tests.support.command_line import answer, last_error, saq
from tests.support.mutations import texts_of
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


def section(text: str, name: str) -> str:
    return text.partition(f'<section id="{name}"')[2].partition("</section>")[0]


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
    assert "qat, learning from the float network, 2 epochs" in text
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


def test_second_model_is_beside_the_first(run: Path, digits: Path) -> None:
    options = ("--images", 10, "--data", digits / "few", "--workers", 0, "--grid", 3, "--overwrite")
    answer(
        "analyze",
        run,
        "--sharpness",
        "--landscape",
        "--against",
        run / "artifacts" / "model.safetensors",
        *options,
    )

    text = section(page_of([run]), "analysis")

    readings = [json.loads(path.read_text()) for path in sorted((run / "analysis").rglob("sharpness.json"))]
    assert len(readings) == 2
    for each in readings:
        assert f"{each['subject']['loss']:.4g}" in text
    assert text.count("<dt>Sharpness</dt>") == text.count("<figure>") == 2


def test_second_model_of_other_settings_is_left_out(run: Path, digits: Path) -> None:
    options = ("--sharpness", "--images", 10, "--data", digits / "few", "--workers", 0, "--overwrite")
    answer("analyze", run, "--against", run / "artifacts" / "model.safetensors", *options)
    assert section(page_of([run]), "analysis").count("<dt>Sharpness</dt>") == 2

    answer("analyze", run, "--rho", 0.6, *options)

    assert section(page_of([run]), "analysis").count("<dt>Sharpness</dt>") == 1


def test_readings_of_another_state_are_left_out(run: Path) -> None:
    assert "of another state" not in page_of([run])
    manifest = json.loads((run / "manifest.json").read_text())
    hashes = manifest["artifacts"] | {"artifacts/model.safetensors": "0" * 64}
    change(run / "manifest.json", artifacts=hashes)

    text = page_of([run])

    assert "of another state of this network" in section(text, "analysis")
    assert "<dt>Sharpness</dt>" not in text


def test_later_export_enters_manifest_and_page(run: Path) -> None:
    before = RunDirectory.open(run).manifest().artifacts

    found = answer("export", run, "--style", "qdq", "--verify-images", 4)

    assert found["onnx"] == str(run / "artifacts" / "model-qdq.onnx")
    added = {
        f"artifacts/model-qdq.{end}": run / "artifacts" / f"model-qdq.{end}"
        for end in ("onnx", "verdict.json")
    }
    assert RunDirectory.open(run).manifest().artifacts == before | {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in added.items()
    }
    assert "<h3>model-qdq.onnx</h3>" in (run / "report.html").read_text()
    assert set(Record.read(RunDirectory.open(run)).onnx) == {
        Path(name).name for name in before if name.endswith(".onnx")
    }


def test_export_into_a_run_in_use_is_refused(run: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from saqcli.runs.locks import Lock\n"
    code += "Lock(Path(sys.argv[1])).take(); print('taken', flush=True); input()"
    command = (sys.executable, "-c", code, str(run))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        refused = saq("export", run, "--style", "qdq", "--verify-images", 4, "--json")
        other.communicate("\n")

    assert refused.exit_code == 1
    assert f"is in use by process {other.pid}" in last_error(refused)
    assert not (run / "artifacts" / "model-qdq.onnx").exists()


def test_analysis_of_a_file_has_a_page_of_its_own(run: Path, digits: Path, tmp_path: Path) -> None:
    file, out = run / "artifacts" / "model.safetensors", tmp_path / "readings"
    answer(
        "analyze", file, "--sharpness", "--images", 10, "--data", digits / "few", "--out", out, "--workers", 0
    )

    assert parts((out / "report.html").read_text()) == ["analysis"]
    assert answer("report", out) == {
        "page": str(out / "report.html"),
        "markdown": str(out / "report.md"),
        "runs": [str(out)],
    }
    assert "| Sharpness |" in (out / "report.md").read_text()


FILES = """
    manifest.json network.json answers.json search.json scores.json pareto.json artifacts/model.verdict.json
    analysis/sensitivity.json analysis/landscape.json analysis/distributions.json
""".split()


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_refused_or_shown(run: Path, name: str) -> None:
    tree = json.loads((run / name).read_text())
    made = 0

    for changed in texts_of(tree, 12):
        (run / name).write_bytes(changed)
        try:
            made += bool(parts(page_of([run])))
        except RunDirectoryError:
            continue

    assert made < 12


def test_page_of_a_run_without_labels(run: Path) -> None:
    results = json.loads((run / "manifest.json").read_text())["results"]
    unknown = dict.fromkeys(("top1", "top5", "loss"))
    stages = [stage | unknown for stage in results["stages"]]
    change(
        run / "manifest.json",
        results=results | unknown | {"float_top1": None, "float_top5": None, "stages": stages},
    )
    answers = json.loads((run / "answers.json").read_text())
    shown = [image | {"label": None} for image in answers["shown"]]
    change(run / "answers.json", lost=None, won=None, classes=[], shown=shown)

    text = page_of([run])

    assert "There were no labels, so accuracy was not measured" in text
    assert f"gives the float network&#39;s answer on {results['agreement']:.2f}\N{NO-BREAK SPACE}% of" in text
    assert "<dt>Top-1</dt>" not in text
    assert "Which of the two is right is unknown without labels." in text


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


def test_comparison_has_a_markdown_twin(runs: Path, tmp_path: Path) -> None:
    found = answer("report", runs / "run", runs / "search", "--out", tmp_path / "both.html")

    text = Path(found["markdown"]).read_text()

    assert found["markdown"] == str(tmp_path / "both.md")
    for name in ("run", "search"):
        assert re.search(rf"^\| (\*\*)?{name}(\*\*)? \|", text, re.MULTILINE)
    policies = [read_run(runs / name).policy for name in ("run", "search")]
    differ = {name: [str(policy[name]) for policy in policies] for name in policies[0]}
    rows = {
        row[0]: list(row[1:]) for row in re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    }
    assert rows == {name: bits for name, bits in differ.items() if bits[0] != bits[1]}


def test_search_has_a_markdown_twin(runs: Path) -> None:
    text = (runs / "search" / "report.md").read_text()

    assert text.startswith(f"<!-- saq {saqcli.__version__} -->")
    for name, bits in read_run(runs / "search").policy.items():
        assert f"| `{name}` | {bits.weight} | {bits.activation} |" in text


def test_report_of_a_quantization_is_not_replaced(run: Path, tmp_path: Path) -> None:
    before = (run / "report.md").read_text()

    write_page([run])
    write_page([run], tmp_path / "page.html")

    assert (run / "report.md").read_text() == before
    assert (tmp_path / "page.md").read_text().partition("\n\n")[2] == before


def test_only_twins_are_replaced(run: Path, tmp_path: Path) -> None:
    notes = tmp_path / "page.md"
    notes.write_text("mine")

    with pytest.raises(ConfigError, match="is no page that saq wrote"):
        write_page([run], tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"end the name with \.html"):
        write_page([run], tmp_path / "other.md")

    assert notes.read_text() == "mine"
    assert not (tmp_path / "page.html").exists()


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
    known = json.loads((runs / "run" / "network.json").read_text())["preprocessing"]
    mean, std = known["mean"][0], known["std"][0]
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


in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open pages in")
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, of text of any size
SMALLEST = 8.5  # pixels


@pytest.fixture(scope="module")
def pages(runs: Path) -> dict[str, Path]:
    """A page of each kind, for a browser."""
    return {
        "quantized": runs / "run" / "report.html",
        "searched": runs / "search" / "report.html",
        "compared": write_page([runs / "run", runs / "search"], runs / "both.html"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["quantized", "searched", "compared"])
@in_browser
def test_page_fits_and_can_be_read(pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    found = look_at(pages[name], width, dark=dark, clicks=[])

    assert (found["width"], found["dark"]) == (width, dark)
    assert found["scrollWidth"] <= width
    assert found["wide"] == []
    assert found["requests"] == []
    assert found["pictures"]
    assert all(wide > 10 and high > 10 for _, wide, high in found["pictures"])
    assert all(found["images"])
    assert len(found["texts"]) > 50
    assert [each for each in found["texts"] if each["contrast"] < LEAST_CONTRAST] == []
    assert min(each["size"] for each in found["texts"]) >= SMALLEST


@in_browser
def test_table_folds_and_unfolds(pages: dict[str, Path]) -> None:
    folded = look_at(pages["quantized"], 1400)

    assert "Show all 20 layers" in folded["text"]
    assert folded["hidden"] == 6


@in_browser
def test_page_is_whole_without_script(pages: dict[str, Path]) -> None:
    found = look_at(pages["quantized"], 390, script=False)

    assert (found["hidden"], found["buttons"]) == (0, 0)
    assert len(found["rows"]) == 20


@in_browser
def test_table_sorts(pages: dict[str, Path]) -> None:
    button = "table.layers th[data-column] button"
    rows = look_at(pages["quantized"], 1400)["rows"]
    once = look_at(pages["quantized"], 1400, clicks=[(button, 0)])["rows"]
    twice = look_at(pages["quantized"], 1400, clicks=[(button, 0), (button, 0)])["rows"]

    assert Counter(rows) == Counter(once) == Counter(twice)
    assert rows[0] == "conv1"
    assert set(once[:2]) == {"conv1", "linear"}  # they have 8 bits
    assert set(twice[-2:]) == {"conv1", "linear"}


@in_browser
def test_control_sees_overflow_and_faint_text(pages: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    style = "width: 3000px; max-width: none; color: #ccc; background: #fff"
    faint = f'<p style="{style}">faint</p><img src="missing.png" alt="x"></body>'
    bad.write_text(pages["searched"].read_text().replace("</body>", faint))

    found = look_at(bad, 390)

    assert found["scrollWidth"] >= 3000
    assert "P." in found["wide"]
    assert [each["text"] for each in found["texts"] if each["contrast"] < LEAST_CONTRAST] == ["faint"]
    assert 0 in found["images"]
