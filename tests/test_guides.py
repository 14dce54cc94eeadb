"""The guides run as they stand: their programs, and their commands in the order of the pages.

On the digits, what ``saq demo`` leaves stands there at the start, with fewer images and a network trained for fewer
epochs (``tests/end_to_end/test_story.py`` runs the demo itself). Commands with ``imagenet`` run on a few small images,
with random weights, and with budgets of that size.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saqcli
from saqcli.data.transforms import image_transform
from tests.support.command_line import saq

PAGES = Path(__file__).resolve().parents[1] / "docs" / "guides"
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
FENCE = re.compile(r"^```(\w*) ?([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILES = {
    name: body
    for text in TEXTS.values()
    for language, name, body in FENCE.findall(text)
    if name and language != "text"
}
ON_DIGITS = ("start", "pictures", "budgets", "choosing", "accuracy", "timm", "deploying")
ON_IMAGENET = ("imagenet", "asga")
ELSEWHERE = {"trtexec": "TensorRT does not run here"}
GIVEN = "saq demo"
BOUND_OF_ACCURACY = "--max-drop"  # what is missed ends with exit code 4

STAND_INS = {
    " resnet18 ": " resnet18 --no-pretrained --input-size 64 ",
    "34G ": "w4a4 ",
    "--epochs 1": "--epochs 1 --batch-size 4",
}


def commands(page: str) -> list[str]:
    shells = (body for language, _, body in FENCE.findall(TEXTS[page]) if language in ("sh", "bash"))
    return [line for body in shells for line in body.replace("\\\n", " ").splitlines() if line.strip()]


def shortened(line: str) -> str:
    """The same with fewer iterations, images and points."""
    line = re.sub(r"--recipe minutes( --iterations \d+)?", "--recipe minutes --iterations 2", line)
    return line.replace("--images 100", "--images 20").replace("--grid 15", "--grid 3")


def perform(line: str) -> str:
    """Run a line of a page in this folder, and return what it printed."""
    first, *words = shlex.split(line, comments=True)
    if first in ELSEWHERE:
        return ""
    if first == "python":
        return program(*words)
    assert first == "saq", line
    result = saq(*words)
    assert result.exit_code == 0 or (result.exit_code == 4 and BOUND_OF_ACCURACY in words), (
        f"{line}\n{result.stderr}"
    )
    return str(result.stdout)


def program(*words: str) -> str:
    """Run a program in this folder, in this process, and return what it printed."""
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", list(words))
        runpy.run_path(words[0], run_name="__main__")
    return printed.getvalue()


def written(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A folder with all programs, and with ``runs/demo``."""
    folder = written(tmp_path_factory.mktemp("guides"))
    shutil.copytree(digits / "few", folder / "runs/demo/digits")
    shutil.copy(digits / "float.safetensors", folder / "runs/demo")
    for image in ("val/3/0003.png", "val/7/0007.png"):
        (folder / "runs/demo/digits" / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(digits / "images" / image, folder / "runs/demo/digits" / image)
    return folder


def test_every_page_with_commands_is_run() -> None:
    assert {page for page in TEXTS if commands(page)} == {*ON_DIGITS, *ON_IMAGENET}
    assert commands("start")[0] == GIVEN


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", ON_DIGITS)
def test_commands_on_digits(page: str, place: Path) -> None:
    with chdir(place):
        if page == "timm":
            program("finetune.py")
        for line in commands(page):
            if line != GIVEN and not (run_of(line) and (place / run_of(line)).exists()):
                perform(shortened(line))
        if page == "start":
            assert program("look.py").split()[-1] == "10])"


def run_of(line: str) -> str:
    """The folder that a command makes: an earlier page may have made it."""
    found = re.search(r"--(?:run-dir|out) (\S+)", line)
    return found[1] if found and "--resume" not in line else ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet_commands_on_a_stand_in(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for data, classes, side in (("imagenet", ("n01440764", "n01443537"), 64), ("cifar10", "0123456789", 32)):
        for split, count in (("train", 8), ("val", 3)):
            for name in classes:
                folder = tmp_path / data / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    Image.fromarray(numbers.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
                        folder / f"{index}.png"
                    )
    with chdir(tmp_path):
        for line in (line for page in ON_IMAGENET for line in commands(page)):
            for old, new in STAND_INS.items():
                line = line.replace(old, new) if "--resume" not in line else line
            perform(shortened(line))
        assert Path("resnet18.verdict.json").is_file()


@pytest.fixture(scope="module")
def deployed(place: Path) -> Path:
    """The folder with a file in style qdq and one in style qonnx of a network at 4 bits, and what it computes."""
    with chdir(place):
        perform(
            "saq quantize --config digits.toml --bits 4 --epochs 0 --run-dir runs/deployed"
            " --style qdq --style qonnx"
        )
        model = saqcli.load("runs/deployed")
        view = image_transform(saqcli.info(model).preprocessing)
        names = sorted(map(str, Path("runs/demo/digits/val").rglob("*.png")))[::6]
        images = torch.stack([view(Image.open(name)) for name in names])
        np.save("images.npy", images.numpy())
        with torch.inference_mode():
            best = model(images).argmax(1).tolist()
        Path("best.json").write_text(json.dumps(dict(zip(names, best, strict=True))), encoding="utf-8")
    return place


def test_fifteen_lines_are_fifteen() -> None:
    lines = [
        line for line in FILES["run_file.py"].splitlines() if line and not line.startswith(("import", "from"))
    ]
    assert len(lines) <= 15


@pytest.mark.parametrize("size", [16, 40])
def test_fifteen_lines_see_what_saq_sees(size: int, deployed: Path) -> None:
    with chdir(deployed):
        best = json.loads(Path("best.json").read_text(encoding="utf-8"))
        wrong = []
        for name, expected in best.items():
            Image.open(name).resize((size + 8 * (size != 16), size), Image.Resampling.BICUBIC).save(
                "resized.png"
            )
            if size != 16:
                model = saqcli.load("runs/deployed")
                with torch.inference_mode():
                    view = image_transform(saqcli.info(model).preprocessing)
                    expected = int(model(view(Image.open("resized.png"))[None]).argmax())
            found = program("run_file.py", "runs/deployed/artifacts/model.onnx", "resized.png").strip()
            if found != str(expected):
                wrong.append(name)
        assert len(best) >= 10
        assert len(wrong) <= len(best) // 10  # of a resized image rounding may decide


def test_openvino_program_equals_saq(deployed: Path) -> None:
    pytest.importorskip("openvino")
    check_program(deployed, "run_openvino.py", "runs/deployed/artifacts/model.onnx")


def test_qonnx_program_equals_saq(deployed: Path) -> None:
    pytest.importorskip("qonnx")
    check_program(deployed, "run_qonnx.py", "runs/deployed/artifacts/model-qonnx.onnx")


def check_program(folder: Path, *words: str) -> None:
    with chdir(folder):
        expected = list(json.loads(Path("best.json").read_text(encoding="utf-8")).values())
        assert json.loads(program(*words, "images.npy")) == expected
