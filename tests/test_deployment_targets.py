"""Targets: their files, what they refuse, and the settings that they bring."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import saqcli
from saqcli.api.files import metadata_of
from saqcli.config import resolve
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.export import STYLES
from saqcli.pipelines.bits import style_for
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.junctions.kinds import KINDS
from saqcli.target import PAPER, TARGETS, Inputs, Kind, Target, find_deployment, parse_target
from tests.support.command_line import answer, last_error, saq

MODEL = ("saq/resnet20", "--no-pretrained", "--num-classes", "10")


def bits(weight: int | None, activation: int | None) -> LayerBits:
    return LayerBits(weight=weight, activation=activation)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_own_targets_are_consistent(target: Target) -> None:
    assert set(target.styles) <= set(STYLES)
    assert set(target.weights.integer) <= set(target.weights.bits)
    assert set(target.inputs.integer) <= set(target.inputs.bits)
    config = resolve(options={"model.name": "saq/resnet20", "quantization.target": target.name})
    target.check_styles(config.export.styles)
    target.check_scheme(Scheme(weight_grid=config.quantization.weight_grid))


def test_kinds_of_junctions_are_those_that_exist() -> None:
    assert set(get_args(Kind)) == set(KINDS)


def test_paper_adds_and_refuses_nothing() -> None:
    paper = TARGETS[PAPER]
    assert paper == Target(name=PAPER, description=paper.description, notes=paper.notes)
    paper.check_styles(tuple(STYLES))
    paper.check_policy({"fc": bits(None, None), "conv1": bits(2, 7)})
    assert not paper.junctions
    assert resolve(options={"model.name": "x", "quantization.target": PAPER}) == resolve(
        options={"model.name": "x"}
    )


def test_settings_of_a_target_lie_below_the_users(tmp_path: Path) -> None:
    named = {"model.name": "x", "quantization.target": "ort-cpu"}
    assert resolve(options=named).quantization.weight_grid == "zero"
    assert resolve(options=named | {"quantization.weight_grid": "auto"}).quantization.weight_grid == "auto"
    file = tmp_path / "run.toml"
    file.write_text('[quantization]\ntarget = "ort-cpu"\nweight_grid = "paper"\n')
    assert resolve(file=file, options={"model.name": "x"}).quantization.weight_grid == "paper"
    assert resolve(file=file, options={"model.name": "x"}).export.styles == TARGETS["ort-cpu"].styles[:1]


def test_config_names_a_target_only_if_given() -> None:
    assert "target" not in resolve(options={"model.name": "x"}).to_json()
    assert (
        '"target": "qonnx"' in resolve(options={"model.name": "x", "quantization.target": "qonnx"}).to_json()
    )
    assert "target" not in Scheme().model_dump_json()


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"conv1": bits(8, 8), "layer1": bits(4, 8)}, "weights of 8 bits, and layer1 has 4"),
        ({"conv1": bits(8, 2)}, "inputs of 8 bits, and conv1 has 2"),
        ({"fc": bits(None, 8)}, "no layer with weights in floating point, as fc has"),
    ],
)
def test_policies_are_refused_by_layer(layers: dict[str, LayerBits], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        TARGETS["int8-generic"].check_policy(layers)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"weight_grid": "paper"}, "weight_grid=paper"),
        ({"weight_quantizer": "asymmetric", "weight_grid": "auto"}, "weight_quantizer=asymmetric"),
        ({"activation_quantizer": "log2", "weight_grid": "zero"}, "uniform grids only"),
    ],
)
def test_schemes_are_refused_by_setting(scheme: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TARGETS["ort-cpu"].check_scheme(Scheme(**scheme))


def test_steps_may_have_to_be_short() -> None:
    text = 'description = "x"\nshort_steps = 1\n[settings.quantization]\nshort_steps = 1\n'
    target = parse_target(text, "x.toml", "x")
    target.check_scheme(Scheme(short_steps=1))
    for short in (None, 2):
        with pytest.raises(ConfigError, match=r"at most 1 significant bit: give.*short_steps=1"):
            target.check_scheme(Scheme(short_steps=short))


def test_candidates_are_those_of_the_target() -> None:
    target = parse_target('description = "x"\n[weights]\nbits = [4, 8]\n', "x.toml", "x")
    assert target.candidates((2, 3, 4, 8), "weights") == (4, 8)
    assert target.candidates((2, 3), "inputs") == (2, 3)
    with pytest.raises(ConfigError, match="4 or 8 bits, and the candidates are 2 or 3"):
        target.candidates((2, 3), "weights")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "description"),
        ('description = "x"\nname = "y"\n', "name is that of the file"),
        ('description = "x"\nspeed = 3\n', "unknown key 'speed'"),
        ('description = "x"\njunctions = ["convolve"]\n', "junctions"),
        ('description = "x"\nformat = 2\n', "format"),
        ('description = "x"\n[weights]\nbits = []\n', "weights.bits"),
        ('description = "x"\n[settings.quantization]\ntarget = "paper"\n', "not for a target to choose"),
        ("description = ", "TOML"),
    ],
)
def test_files_of_targets_are_strict(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        find_deployment(str(file))


def test_own_target_works_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "chip.toml"
    file.write_text('description = "a chip"\nstyles = ["qonnx"]\n[inputs]\nbits = [4, 8]\n')
    plan = answer("quantize", *MODEL, "--bits", "4", "--target", str(file), "--style", "qonnx", "--dry-run")
    assert plan["config"]["quantization"]["target"] == str(file)
    wrong_bits = ("quantize", *MODEL, "--bits", "w4a3", "--target", file, "--style", "qonnx", "--dry-run")
    assert "inputs of 4 or 8 bits, and layer1.0.conv1 has 3" in last_error(saq(*wrong_bits))
    wrong_style = ("quantize", *MODEL, "--bits", "4", "--target", file, "--style", "qdq", "--dry-run")
    assert "style qonnx, not qdq" in last_error(saq(*wrong_style))


def test_listing_shows_every_target() -> None:
    lines = saq("targets").stdout
    assert all(name in lines for name in TARGETS)
    assert answer("targets")["targets"][0]["name"] == PAPER
    assert answer("targets", "qonnx")["styles"] == ["qonnx"]
    assert "TARGET" in last_error(saq("targets", "nothing"))


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def test_library_quantizes_for_a_target() -> None:
    images = [torch.rand(4, 3, 8, 8)]
    quantized = saqcli.quantize_model(small_net(), 8, target="openvino", calibration=images)
    assert [name for name, _ in quantized.named_modules() if name.endswith("junctions.0")] == [
        "3.junctions.0"
    ]
    found = saqcli.info(quantized).quantization
    assert found is not None
    assert found.scheme.target == "openvino"
    plain = saqcli.quantize_model(small_net(), 8, calibration=images)
    assert saqcli.bops(quantized) == saqcli.bops(plain)
    with pytest.raises(UnsupportedModel, match="2 has 4"):
        saqcli.quantize_model(small_net(), 4, target="int8-generic", calibration=images)
    with pytest.raises(ConfigError, match="remove `junctions`, or `target`"):
        saqcli.quantize_model(small_net(), 8, target="openvino", junctions=("add",), calibration=images)
    with pytest.raises(ConfigError, match="style trt, not qdq"):
        saqcli.quantize_model(small_net(), 8, target="tensorrt", export="qdq", calibration=images)


def test_export_refuses_runs_without_the_targets_quantizers(tmp_path: Path) -> None:
    images, path = [torch.rand(4, 3, 8, 8)], tmp_path / "net.safetensors"
    net = saqcli.quantize_model(small_net(), 8, calibration=images, weight_grid="zero")
    metadata = metadata_of(net)
    with pytest.raises(UnsupportedModel, match=r"operands of pool, and.*quantization.target=openvino"):
        style_for(metadata, net, None, "openvino")
    assert style_for(metadata, net, None, None) == "qdq"
    net = saqcli.quantize_model(small_net(), 8, calibration=images, weight_grid="zero", target="openvino")
    saqcli.save(net, path)
    net = saqcli.load(path, model=small_net())
    metadata = metadata_of(net)
    assert style_for(metadata, net, None, None) == style_for(metadata, net, None, "openvino") == "qdq-vnni"
    assert style_for(metadata, net, None, "tensorrt") == "trt"
    with pytest.raises(ConfigError, match="style trt, not qdq"):
        style_for(metadata, net, "qdq", "tensorrt")


class Joined(nn.Module):
    """A residual addition, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.fc((x + self.second(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != PAPER])
def test_files_for_every_target_are_proved(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = saqcli.quantize_model(
        Joined(), 8, target=target, calibration=[torch.randn(16, 3, 8, 8)], weight_grid="zero"
    )
    verdict = saqcli.export_onnx(quantized, tmp_path / "net.onnx", style=TARGETS[target].styles[0])
    assert verdict.verified


def test_pins_do_not_evade_the_target() -> None:
    pinned = ("--pin", "layer1.0.conv1=3", "--target", "int8-generic", "--budget", "w8a8", "--dry-run")
    assert "layer1.0.conv1 has 3" in last_error(saq("search", *MODEL, *pinned))
    with pytest.raises(UnsupportedModel, match="second has 4"):
        saqcli.quantize_model(
            Joined(),
            budget="w8a8",
            target="int8-generic",
            pins={"second": "4"},
            candidates=(8,),
            calibration=[torch.randn(16, 3, 8, 8)],
        )


def test_own_target_brings_its_style(tmp_path: Path) -> None:
    file = tmp_path / "chip.toml"
    file.write_text(
        'description = "a chip"\nstyles = ["qonnx"]\n[weights]\nbits = [4, 8]\n[inputs]\nbits = [8]\n'
    )
    options = {"model.name": "x", "quantization.target": str(file)}
    assert resolve(options=options).export.styles == ("qonnx",)
    plan = answer("search", *MODEL, "--target", file, "--budget", "w4a8", "--dry-run")
    assert plan["budget_bops"] is not None


def test_library_searches_for_a_target() -> None:
    images = [torch.randn(16, 3, 8, 8)]
    chip = Target(name="chip", description="-", junctions=("add", "pool"), count_junctions=True)
    chip = chip.model_copy(update={"inputs": Inputs(bits=(8,))})
    found = saqcli.search(Joined(), "w8a8", images, target=chip, short_steps=4)
    assert {each.activation for each in found.policy.layers.values()} == {8}
    plain = saqcli.search(Joined(), "w8a8", images, activation_candidates=(8,))
    kinds = 4 * 6 * 6 + 4  # numbers that the addition and the pool return
    assert found.budget.bops is not None
    assert plain.budget.bops is not None
    assert found.budget.bops - plain.budget.bops == kinds * 64
    quantized = saqcli.quantize_model(
        Joined(), policy=found.policy, target=chip, short_steps=4, calibration=images
    )
    assert saqcli.bops(quantized) == found.cost.bops
    same = saqcli.quantize_model(Joined(), budget="w8a8", target=chip, calibration=images)
    assert saqcli.bits(same) == saqcli.search(Joined(), "w8a8", images, target=chip).policy
    with pytest.raises(UnsupportedModel, match="second has 4"):
        saqcli.search(Joined(), "w8a8", images, target="int8-generic", pins={"second": "4"})
    with pytest.raises(ConfigError, match="candidates are 2 or 3"):
        saqcli.search(Joined(), "w8a8", images, target="int8-generic", candidates=(2, 3))
    with pytest.raises(ConfigError, match="remove `junctions`, or `target`"):
        saqcli.search(Joined(), "w8a8", images, target=chip, junctions=("add",))
    with pytest.raises(ConfigError, match='no `weight_grid="paper"`'):
        saqcli.search(Joined(), "w8a8", images, target="tensorrt", weight_grid="paper")


def test_library_checks_exports_for_a_target() -> None:
    example = torch.randn(2, 3, 8, 8)
    saqcli.check_export(Joined(), "ort", example=example, target="ort-cpu", weight_grid="zero", short_steps=4)
    saqcli.check_export(Joined(), "qdq", example=example, junctions=("add",))
    with pytest.raises(ConfigError, match="style trt, not qdq"):
        saqcli.check_export(Joined(), "qdq", example=example, target="tensorrt", weight_grid="zero")
    plain = saqcli.quantize_model(Joined(), 8, calibration=[example], weight_grid="zero")
    saqcli.check_export(plain, "qdq")
    with pytest.raises(UnsupportedModel, match="operands of add or pool, and"):
        saqcli.check_export(plain, "qdq", target="openvino")
    joined = saqcli.quantize_model(Joined(), 8, calibration=[example], target="openvino", weight_grid="zero")
    saqcli.check_export(joined, "qdq", target="openvino")


def test_files_say_whether_junctions_count(tmp_path: Path) -> None:
    chip = Target(name="chip", description="-", junctions=("add",), count_junctions=True)
    made = saqcli.quantize_model(Joined(), 8, target=chip, calibration=[torch.randn(4, 3, 8, 8)])
    saqcli.save(made, tmp_path / "net.safetensors")
    loaded = saqcli.load(tmp_path / "net.safetensors", model=Joined(), example=torch.randn(1, 3, 8, 8))
    assert saqcli.bops(loaded) == saqcli.bops(made)
    free = Target(name="chip", description="-", junctions=("add",))
    other = saqcli.quantize_model(Joined(), 8, target=free, calibration=[torch.randn(4, 3, 8, 8)])
    assert saqcli.bops(made) - saqcli.bops(other) == 4 * 6 * 6 * 64
    assert "counted" not in metadata_of(other).model_dump_json()
