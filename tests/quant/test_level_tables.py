"""Grids that are tables of levels, and quantizers of weights and inputs apart."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saqcli.analysis.base import Session, Settings
from saqcli.analysis.distributions import measure_distributions
from saqcli.config import QuantizationSection
from saqcli.errors import ConfigError, CorruptArtifact, UnsupportedGrid
from saqcli.export.operators import frozen_copy
from saqcli.export.safetensors import SafetensorsExporter, read_content, rebuild
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.clip_init import best_level, squared_error
from saqcli.quant.convert import Scheme
from saqcli.quant.grid import AnyGrid, Grid, LevelTable, WeightGrid, fake_quantize, pack, unpack
from saqcli.quant.quantizers import (
    QUANTIZERS,
    ClipActivation,
    ClipWeight,
    NormalizedClipWeight,
    QuantizerEntry,
    name_of,
)
from saqcli.quant.quantizers.learned_step import LsqActivation, LsqWeight
from tests.support import tiny
from tests.support.networks import NETWORKS, images, quantize
from tests.support.strategies import tensors

TABLE = LevelTable((-1.0, -0.5, -0.2, 0.0, 0.25, 1.0))
tables = st.lists(st.integers(-1000, 1000), min_size=2, max_size=40, unique=True).map(
    lambda codes: LevelTable(tuple(sorted({-1.0, 0.0, *(code / 7 for code in codes), 200.0})))
)


def powers(bits: int) -> LevelTable:
    """Zero and powers of two of both signs."""
    positive = [2.0**-k for k in range(2 ** (bits - 1) - 1)]
    return LevelTable((*(-each for each in positive), 0.0, *reversed(positive)))


class PowerWeight(ClipWeight):
    weight_grids = ("auto",)
    granularities = ("channel",)

    @classmethod
    def weight_grid(cls, bits: int, kind: WeightGrid) -> AnyGrid:
        return powers(min(bits, 4))


class NormalizedPowerWeight(PowerWeight, NormalizedClipWeight):
    plain = PowerWeight


class PowerActivation(ClipActivation):
    @classmethod
    def activation_grid(cls, bits: int, *, signed: bool) -> AnyGrid:
        codes = powers(min(bits, 4)).codes
        return LevelTable(codes if signed else tuple(code for code in codes if code >= 0))


POWERS = QuantizerEntry("powers of two", PowerWeight, PowerActivation, NormalizedPowerWeight)


@pytest.fixture
def registered() -> Iterator[None]:
    QUANTIZERS["powers"] = POWERS
    QUANTIZERS["inputs_only"] = QuantizerEntry("inputs", activation=LsqActivation)
    QUANTIZERS["weights_only"] = QuantizerEntry("weights", weight=LsqWeight)
    yield
    for name in ("powers", "inputs_only", "weights_only"):
        del QUANTIZERS[name]


# The grid


def test_values_go_to_the_nearest_or_lower_level() -> None:
    x = torch.tensor([-9.0, -0.75, -0.74, -0.1, -0.09, 0.125, 0.13, 0.625, 0.63, 9.0, float("nan")])
    expected = torch.tensor([-1.0, -1.0, -0.5, -0.2, 0.0, 0.0, 0.25, 0.25, 1.0, 1.0, float("nan")])
    assert torch.equal(TABLE.nearest(x)[:-1], expected[:-1])
    assert TABLE.nearest(x)[-1].isnan()


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        ((0.0,), "2 to 256"),
        ((0.5, 1.0), "from 0 or below"),
        ((-1.0, 0.0), "above 0"),
        ((0.0, float("inf")), "finite"),
        ((0.0, 0.5, 0.5, 1.0), "ascend"),
        ((0.0, 1.0, 1.00001), "ascend"),
        ((-1.0, -2.0, 1.0), "ascend"),
        (tuple(range(257)), "2 to 256"),
    ],
)
def test_invalid_tables_are_refused(codes: tuple[float, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LevelTable(codes)


@given(table=tables, seed=st.integers(0, 100))
def test_packed_codes_are_restored(table: LevelTable, seed: int) -> None:
    bits = (table.levels - 1).bit_length()
    index = torch.randint(table.levels, (3, 5), generator=torch.Generator().manual_seed(seed))
    codes = table.codes_at(index)
    packed = pack(codes, table, bits)
    assert packed.numel() == -(-15 * bits // 8)
    assert torch.equal(unpack(packed, table, bits, (3, 5)), codes)
    assert torch.equal(table.indices(codes), index)


def test_index_outside_the_table_is_refused() -> None:
    with pytest.raises(CorruptArtifact, match="outside a grid of 6 levels"):
        unpack(torch.tensor([0b111_00000], dtype=torch.uint8), TABLE, 3, (1,))


@given(x=tensors(3, torch.float64), table=tables, level=st.floats(0.1, 10))
def test_gradients_match_the_formula(x: Tensor, table: LevelTable, level: float) -> None:
    x, a = x.clone().requires_grad_(), torch.tensor(level, dtype=torch.float64, requires_grad=True)
    upstream = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    q = fake_quantize(x, a, table)
    q.backward(upstream)
    v = x.detach() / level
    inside = (v <= 1) & (v >= table.lowest / table.highest)
    slope = torch.where(inside, q.detach() / level - v, q.detach() / level)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * inside)
    torch.testing.assert_close(a.grad, (upstream * slope).sum(), rtol=1e-9, atol=1e-12 * x.numel())


@pytest.mark.parametrize("grid", [powers(3), powers(4), TABLE], ids=["3 bits", "4 bits", "uneven"])
def test_fitted_level_is_near_the_best(grid: LevelTable) -> None:
    x = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    scanned = min(float(squared_error(x, level, grid)) for level in torch.linspace(0.01, 1, 2000))
    assert float(squared_error(x, best_level(x, grid), grid)) < 1.002 * scanned


# Quantizers with tables, in a network


def settled(scheme: Scheme, bits: int = 3, candidates: tuple[int, ...] = ()) -> tuple[Any, Tensor]:
    net, x = tiny.build("conv_bn")
    tiny.quantized(net, x, bits, scheme, candidates)
    return net, x


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("normalized", [False, True])
def test_file_with_tables_is_bit_identical(normalized: bool, tmp_path: Path) -> None:
    scheme = Scheme(quantizer="powers", weight_normalization=normalized)
    quantized = quantize(NETWORKS["conv_bn"], scheme=scheme)
    path = tmp_path / "model.safetensors"
    SafetensorsExporter().export(quantized.model, images(2), path, quantized.facts)
    metadata, tensors = read_content(path)
    model = rebuild(NETWORKS["conv_bn"](), metadata, tensors, str(path))
    with torch.no_grad():
        assert torch.equal(model(images(16)), quantized.model(images(16)))
    with pytest.raises(UnsupportedGrid, match="quantizer powers has a table of levels") as refusal:
        frozen_copy(model)
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("registered")
def test_file_of_a_missing_quantizer_names_it(tmp_path: Path) -> None:
    quantized = quantize(NETWORKS["conv_bn"], scheme=Scheme(weight_quantizer="powers"))
    path = tmp_path / "model.safetensors"
    SafetensorsExporter().export(quantized.model, images(2), path, quantized.facts)
    metadata, tensors = read_content(path)
    del QUANTIZERS["powers"]
    try:
        with pytest.raises(CorruptArtifact, match="no installed package has its quantizer 'powers'"):
            rebuild(NETWORKS["conv_bn"](), metadata, tensors, str(path))
    finally:
        QUANTIZERS["powers"] = POWERS


@pytest.mark.usefixtures("registered")
def test_switching_bits_switches_tables() -> None:
    net, x = settled(Scheme(quantizer="powers"), 4, (2, 3))
    answers = []
    with torch.no_grad():
        for bits in (4, 2, 3, 4):
            layers = dict.fromkeys(convert.quantized_layers(net), LayerBits(weight=bits, activation=bits))
            convert.apply(net, BitConfig(model="tiny", layers=layers))
            answers.append(net(x))
    assert torch.equal(answers[0], answers[3])
    assert not torch.equal(answers[1], answers[2])


@pytest.mark.usefixtures("registered")
def test_distributions_hold_the_table() -> None:
    from tests.analysis.test_instruments import subject_of

    subject = subject_of()
    layer = next(iter(subject.layers.values()))
    subject = replace(subject, scheme=Scheme(quantizer="powers"))
    layer.weight_quantizer = subject.scheme.new_weight_quantizer(layer, [3])
    layer.weight_quantizer.fit(layer.latent_weight().detach())  # type: ignore[operator]
    first, *others = json.loads(measure_distributions(subject, Settings(), Session()).model_dump_json())[
        "layers"
    ]
    weights = first["weights"]
    assert (weights["table"], weights["stride"], weights["lowest"]) == (list(powers(3).codes), None, -1.0)
    assert len(weights["codes"]) == 7
    assert sum(weights["codes"]) == pytest.approx(1)
    assert all("table" not in other["weights"] for other in others)


def test_entry_of_a_quantizer_is_named() -> None:
    assert name_of(LsqWeight({4: Grid(-7, 7, 1)})) == "lsq"
    assert name_of(PowerWeight({4: powers(4)})) == "PowerWeight"


# Weights and inputs apart


@pytest.mark.usefixtures("registered")
def test_weights_and_inputs_are_combined_freely() -> None:
    net, _ = settled(
        Scheme(quantizer="clip", weight_quantizer="weights_only", activation_quantizer="inputs_only")
    )
    for layer in convert.quantized_layers(net).values():
        assert (type(layer.weight_quantizer), type(layer.input_quantizer)) == (LsqWeight, LsqActivation)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"quantizer": "weights_only"},
            "weights_only is for weights only: choose .*activation_quantizer` from clip",
        ),
        (
            {"quantizer": "inputs_only"},
            "inputs_only is for inputs only: choose .*weight_quantizer` from clip",
        ),
        ({"weight_quantizer": "magic"}, "no quantizer 'magic'"),
        (
            {"weight_quantizer": "powers", "weight_grid": "zero"},
            "weight_grid=zero` is not defined for .*choose auto",
        ),
        ({"weight_quantizer": "powers", "granularity": "tensor"}, "granularity=tensor` .*choose channel"),
        ({"activation_quantizer": "lsq", "clip_init": "paper"}, "not defined for quantizer lsq: choose clip"),
    ],
)
def test_combinations_that_do_not_exist_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        Scheme(**settings).check()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("schema", [Scheme, QuantizationSection])
def test_json_has_single_quantizers_only_if_set(schema: Any) -> None:
    assert "weight_quantizer" not in json.loads(schema().model_dump_json())
    assert schema.model_validate_json(schema().model_dump_json()) == schema()
    one = schema(weight_quantizer="lsq")
    found = json.loads(one.model_dump_json())
    assert found["weight_quantizer"] == "lsq"
    assert "activation_quantizer" not in found
    assert schema.model_validate(found) == one


class TooMany(ClipWeight):
    @classmethod
    def weight_grid(cls, bits: int, kind: WeightGrid) -> AnyGrid:
        return powers(8)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (ClipWeight, "it is a .*, not a QuantizerEntry"),
        (QuantizerEntry("nothing"), "neither a weight nor an activation class"),
        (QuantizerEntry("a tensor", weight=Tensor), "is not derived from Quantizer"),  # type: ignore[arg-type]
        (QuantizerEntry("too many", weight=TooMany), "at most 4 codes at 2 bits"),
    ],
)
def test_entries_that_break_the_contract_are_refused(entry: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        QUANTIZERS["broken"] = entry
    assert "broken" not in QUANTIZERS
