"""Parts of the page of a run: answers, proofs in words, scales of pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from saqcli.data.datasets import Split
from saqcli.data.images import ImageSet
from saqcli.report.answers import MOST_SHOWN, Answers, write_answers
from saqcli.report.page.contents import VerdictFile
from saqcli.report.page.proofs import proof_of
from saqcli.report.page.svg import Scale, spread
from saqcli.runs.directory import RunDirectory


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
