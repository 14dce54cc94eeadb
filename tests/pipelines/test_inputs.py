"""Networks with other sizes, channels, classes and heads, or another forward pass in training."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from saqcli.cli.options import parse_assignments, parse_size
from saqcli.config import ModelSection, RunConfig, resolve
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.models.preprocessing import Preprocessing
from saqcli.pipelines.setup import load_float, wrap_and_trace
from saqcli.progress import SILENT
from saqcli.random_state import random_state
from saqcli.training.objective import cut, sizes
from saqcli.training.preflight import check_trains
from tests.support.command_line import answer, last_error, saq


class TestInputSize:
    @pytest.mark.parametrize(("text", "size"), [("224", 224), ("96x64", (96, 64)), (" 8X8 ", (8, 8))])
    def test_parses_side_or_height_and_width(self, text: str, size: object) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "0", "-3", "x64", "96x0", "3x96x64", "96,64", "1e3", "9999999"])
    def test_invalid_sizes_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="256x192"):
            parse_size(text)

    @pytest.mark.parametrize(
        ("name", "options", "size"),
        [
            ("timm/test_resnet", ["--input-size", "96x64", "--in-chans", 1], [1, 96, 64]),
            ("timm/test_vit", ["--input-size", "96x64", "--in-chans", 5], [5, 96, 64]),
            ("timm/test_vit", ["--input-size", 80, "--model-kwargs", "dynamic_img_size=true"], [3, 80, 80]),
            (
                "timm/test_vit",
                ["--input-size", 90, "--model-kwargs", "dynamic_img_size=true,dynamic_img_pad=true"],
                [3, 90, 90],
            ),
            ("torchvision/squeezenet1_1", ["--input-size", "48x64"], [3, 48, 64]),
            ("saq/resnet20", ["--input-size", "48x32", "--in-chans", 2], [2, 48, 32]),
        ],
    )
    def test_size_reaches_the_network(self, name: str, options: list[object], size: list[int]) -> None:
        found = answer("profile", name, "--no-pretrained", "--num-classes", 7, *options)

        assert (found["input_size"], found["num_classes"]) == (size, 7)
        assert [layer["pinned"] for layer in found["layers"]].count(True) == 2

    @pytest.mark.parametrize("command", ["profile", "eval"])
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--input-size", 90], "3x90x90"),  # no multiple of a patch
            (["--model-kwargs", "global_pool="], "tensor of (1, 101, 9)"),  # scores for every patch
        ],
    )
    def test_model_without_logits_is_refused(self, command: str, options: list[object], says: str) -> None:
        result = saq(command, "timm/test_vit", "--no-pretrained", "--num-classes", 9, *options, "--json")

        assert result.exit_code == 1
        assert says in last_error(result)
        assert "timm/test_vit" in last_error(result)
        assert "--input-size" in last_error(result)


def test_builder_arguments_may_be_lists() -> None:
    found = parse_assignments("depths=[1, 2,1],act_layer=silu, dynamic=True,drop=0.5,pool=", "--model-kwargs")
    assert found == {"depths": [1, 2, 1], "act_layer": "silu", "dynamic": True, "drop": 0.5, "pool": ""}
    profiled = answer(
        *("profile", "timm/convnext_atto", "--no-pretrained", "--num-classes", 3, "--input-size", 32),
        *("--model-kwargs", "depths=[1,1,1,1],dims=[8,8,8,8]"),
    )
    assert len(profiled["layers"]) == 1 + 3 + 4 * 3 + 1


@pytest.mark.parametrize(
    ("name", "kwargs", "heads"),
    [
        ("timm/deit_tiny_distilled_patch16_224", {"depth": 1}, ["head", "head_dist"]),
        ("timm/levit_128s", {}, ["head.linear", "head_dist.linear"]),
        ("timm/test_resnet", {}, ["fc"]),
        ("torchvision/squeezenet1_1", {}, ["classifier.1"]),
    ],
)
def test_all_classifiers_are_pinned(name: str, kwargs: dict[str, Any], heads: list[str]) -> None:
    section = ModelSection(name=name, pretrained=False, num_classes=3, input_size=64, kwargs=kwargs)
    costs = wrap_and_trace(load_float(section, SILENT)).costs
    stem, *pinned = [layer for layer in costs.layers if layer.pinned]

    assert stem.name == costs.layers[0].name
    assert [layer.name for layer in pinned] == heads
    assert {(layer.pinned.weight, layer.pinned.activation) for layer in pinned if layer.pinned} == {(8, 8)}


class Auxiliary(nn.Module):
    """Returns a second output in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
        self.head = nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Any:
        scores = self.head(self.layers(x))
        return (scores, scores) if self.training else scores


class Scoreless(Auxiliary):
    """Returns features in training."""

    def forward(self, x: Tensor) -> Any:
        return self.layers(x).reshape(len(x), 4, 36) if self.training else self.head(self.layers(x))


class EvaluationAlone(Auxiliary):
    """Fails in training mode."""

    def forward(self, x: Tensor) -> Any:
        if self.training:
            raise NotImplementedError("reparameterized for inference\nand more")
        return super().forward(x)


class Pooled(nn.Module):
    """Has a batch norm over single values, which needs two images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))


class Dense(Pooled):
    """Another norm over flat features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((2, 3))))


class Instances(Pooled):
    """A norm over the pixels of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(3)


class TestTraining:
    size = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)

    @staticmethod
    def config(**options: Any) -> RunConfig:
        return resolve(
            options={"model.name": "any"} | {f"training.{key}": value for key, value in options.items()}
        )

    @pytest.mark.parametrize(
        ("build", "options", "says"),
        [
            (Auxiliary, {}, "returns a tuple"),
            (Scoreless, {}, r"returns a tensor of \(2, 4, 36\)"),
            (EvaluationAlone, {}, "fails in training on 2 images: reparameterized for inference;"),
            (Pooled, {"micro_batch": 1}, "fails in training on 1 image: "),
        ],
    )
    def test_untrainable_model_is_one_line_error(
        self, build: Callable[[], nn.Module], options: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(UnsupportedModel, match=says) as caught:
            check_trains(build().eval(), "any", self.size, self.config(**options))
        assert "`training.epochs=0`" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("build", [Pooled, Dense])
    @pytest.mark.parametrize(
        ("batch", "images", "options", "cause", "remedy"),
        [
            (
                128,
                900,
                {"micro_batch": 1},
                "`training.micro_batch=1` leaves",
                "give `training.micro_batch=2` or more,",
            ),
            (
                128,
                900,
                {"sharpness_batch": 1},
                "`training.sharpness_batch=1` leaves",
                "give `training.sharpness_batch=2` or more,",
            ),
            (
                5,
                900,
                {"micro_batch": 2},
                "`training.micro_batch=2` with batches of 5 leaves",
                "give `training.micro_batch=3` or more,",
            ),
            (1, 900, {}, "`data.batch_size=1` leaves", "give `data.batch_size=2` or more,"),
            (128, 1, {"micro_batch": 1}, "a training set of 1 image leaves", "give more images,"),
        ],
    )
    def test_batch_of_one_names_its_cause(
        self,
        build: Callable[[], nn.Module],
        batch: int,
        images: int,
        options: dict[str, Any],
        cause: str,
        remedy: str,
    ) -> None:
        config = self.config(**options)
        config = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch})})

        with pytest.raises(UnsupportedModel) as caught:
            check_trains(build().eval(), "any", self.size, config, images=images)

        assert f". {cause} a single image in a forward pass" in str(caught.value)
        assert remedy in str(caught.value)
        check_trains(Pooled().eval(), "any", self.size, self.config(micro_batch=2), images=900)

    def test_too_small_images_are_named(self) -> None:
        with pytest.raises(UnsupportedModel) as caught:
            check_trains(Instances().eval(), "any", self.size, self.config(micro_batch=1))

        assert "fails in training on 1 image: Expected more than 1 spatial element" in str(caught.value)
        assert "-batch" not in str(caught.value)
        assert "`model.input_size`" in str(caught.value)

    @pytest.mark.parametrize(("batch", "micro"), [(7, 2), (8, 3), (9, 4), (12, 12), (1, 5)])
    def test_micro_batch_sizes_match_the_split(self, batch: int, micro: int) -> None:
        assert sizes(batch, micro) == [len(part[0]) for part in cut([torch.zeros(batch)], micro)]

    @pytest.mark.parametrize("build", [Pooled, Auxiliary])
    def test_preflight_changes_nothing(self, build: Callable[[], nn.Module]) -> None:
        model = build().eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = torch.get_rng_state(), random.random.__self__.getstate(), np.random.get_state()[1].copy()  # type: ignore[attr-defined]

        try:
            check_trains(model, "any", self.size, self.config())
        except UnsupportedModel:
            assert build is Auxiliary

        assert not any(module.training for module in model.modules())
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.equal(state[0], torch.get_rng_state())
        assert random_state()["python"][1] == list(state[1][1])
        assert np.array_equal(np.random.get_state()[1], state[2])

    def test_auxiliary_heads_are_refused_early(self, grey: Path, tmp_path: Path) -> None:
        options = [
            "--no-pretrained",
            "--num-classes",
            2,
            "--input-size",
            64,
            "--data",
            grey,
            "--bits",
            4,
            "--quiet",
        ]
        options += ["--model-kwargs", "aux_logits=true", "--run-dir", tmp_path / "run"]

        result = saq("quantize", "torchvision/googlenet", *options)

        assert result.exit_code == 1
        assert "GoogLeNetOutputs" in last_error(result)
        assert not (tmp_path / "run").exists()

    def test_auxiliary_heads_stay_float(self) -> None:
        section = ModelSection(
            name="torchvision/googlenet", pretrained=False, input_size=64, kwargs={"aux_logits": True}
        )
        traced = wrap_and_trace(load_float(section, SILENT)).traced

        assert {name.partition(".")[0] for name in traced.idle} == {"aux1", "aux2"}
        assert not [name for name in traced.layers if name.startswith("aux")]


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of two classes in another shape than the network's: bright above or bright below."""
    folder = tmp_path_factory.mktemp("grey")
    generator = np.random.default_rng(0)
    for split, label, count in [(s, c, n) for s, n in (("train", 8), ("val", 4)) for c in (0, 1)]:
        (folder / split / f"class{label}").mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 100, (60, 72), dtype=np.uint8)
            pixels[30 * label : 30 * label + 30] += 100
            Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{number}.png")
    return folder


def test_grey_images_work_end_to_end(grey: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [
        "--no-pretrained",
        "--num-classes",
        2,
        "--in-chans",
        1,
        "--input-size",
        "48x32",
        "--workers",
        0,
    ]
    done = answer(
        *("quantize", "timm/test_resnet", *options, "--data", grey, "--bits", 4, "--epochs", 1),
        *("--batch-size", 8, "--run-dir", run),
    )
    files = [run / "artifacts" / name for name in ("model.safetensors", "model.onnx")]
    graph = onnx.load(files[1]).graph

    assert done["images"] == 8
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim][1:] == [1, 48, 32]
    assert json.loads((run / "config.json").read_text())["model"]["input_size"] == [48, 32]
    scores = [answer("eval", target, "--data", grey) for target in (run, *files)]
    assert {score["top1"] for score in scores} == {done["top1"]}
    assert scores[0]["loss"] == scores[1]["loss"] == pytest.approx(scores[2]["loss"], rel=1e-3)
