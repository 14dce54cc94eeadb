"""The picture of a bit configuration: any network, any bits, reproducible files."""

from pathlib import Path

import pytest

from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits, mean_bits
from saqcli.quant.cost import CostModel, LayerCost, cost_model
from saqcli.quant.tracer import trace
from saqcli.report.canvas import style
from saqcli.report.policy import draw_policy, paint_policy
from tests.support.tiny import build

FLOAT = LayerBits(weight=None, activation=None)
EIGHT = LayerBits(weight=8, activation=8)


def costs_of(name: str) -> CostModel:
    net, x = build(name)
    convert.wrap(net)
    return cost_model(trace(net, x[:1]))


def deep(count: int) -> CostModel:
    """As many layers as requested."""
    return CostModel(
        tuple(
            LayerCost(
                f"stages.{k // 12}.blocks.{k}.convolution_with_a_long_name",
                "Conv2d",
                1000 * (k % 7 + 1),
                90,
                f"g{k}",
                EIGHT if k in (0, count - 1) else None,
            )
            for k in range(count)
        )
    )


def mixed(costs: CostModel) -> BitConfig:
    layers = {
        layer.name: layer.pinned or LayerBits(weight=2 + k % 7, activation=8 - k % 5)
        for k, layer in enumerate(costs.layers)
    }
    return BitConfig(model="tiny", layers=layers)


def texts(costs: CostModel, config: BitConfig) -> list[str]:
    """All text in the picture."""
    from matplotlib.text import Text

    with style():
        found = paint_policy(config, costs, "a title").findobj(Text)
    return [text.get_text() for text in found if text.get_text()]


@pytest.mark.parametrize("count", [1, 120])
def test_any_number_of_layers_fits(count: int, tmp_path: Path) -> None:
    costs = deep(count)

    drawn = draw_policy(mixed(costs), costs, tmp_path / "policy", f"{count} layers")

    assert [path.name for path in drawn] == ["policy.png", "policy.svg"]
    assert drawn[0].read_bytes()[:4] == b"\x89PNG"
    width = int.from_bytes(drawn[0].read_bytes()[16:20], "big")
    assert 600 < width < 4000


def test_same_policy_gives_the_same_file(tmp_path: Path) -> None:
    costs = costs_of("residual")
    drawn = [draw_policy(mixed(costs), costs, tmp_path / name, "the same") for name in "ab"]

    assert [path.read_bytes() for path in drawn[0]] == [path.read_bytes() for path in drawn[1]]


def test_shows_costs_and_layer_names() -> None:
    costs = costs_of("residual")
    config = mixed(costs)
    said = texts(costs, config)

    assert {layer.name for layer in costs.layers} <= set(said)
    facts = next(text for text in said if text.startswith("mean bits"))
    assert str(costs.cost(config)) in facts
    weights, inputs = mean_bits(config.layers, {layer.name: layer.macs for layer in costs.layers})
    assert f"weights {weights:.2f}, inputs {inputs:.2f}" in facts
    assert any(text.startswith("pinned") for text in said)
    assert not any("floating point" in text for text in said)


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_float_layers_are_labelled(name: str) -> None:
    costs = costs_of(name)
    config = BitConfig(model="tiny", layers=dict.fromkeys((layer.name for layer in costs.layers), FLOAT))
    said = texts(costs, config)

    assert said.count("32") == 2 * len(costs.layers)
    assert any("floating point" in text for text in said)
    assert not any(text.startswith("pinned") for text in said)  # none has its pinned bits


def test_one_operand_may_be_float() -> None:
    costs = costs_of("mlp")
    half = LayerBits(weight=4, activation=None)
    config = mixed(costs)
    said = texts(costs, config.model_copy(update={"layers": {**config.layers, costs.layers[1].name: half}}))

    assert said.count("32") == 1


class TestMeanBits:
    def test_weighted_by_macs(self) -> None:
        layers = {"a": LayerBits(weight=2, activation=4), "b": LayerBits(weight=6, activation=None)}

        assert mean_bits(layers, {"a": 3, "b": 1}) == (3.0, 11.0)

    def test_empty_policy_has_no_mean(self) -> None:
        assert mean_bits({}, {}) == (0.0, 0.0)
