"""The policy file and the notations of bits and quantities: what is written parses again, invalid text does not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saqcli.errors import ConfigError, PolicyMismatch
from saqcli.quant.bits import BitConfig, LayerBits, parse_bits, parse_candidates, uniform
from saqcli.serialization import parse_json
from saqcli.units import format_quantity, parse_quantity
from tests.support.strategies import BITS
from tests.support.strategies import bits as widths

W4A4 = LayerBits(weight=4, activation=4)
layer_bits = st.builds(LayerBits, weight=st.none() | widths(), activation=st.none() | widths())
names = st.text(min_size=1, max_size=20)


def policy(**changes: object) -> str:
    """A small policy as text, with some keys replaced."""
    tree = {"schema_version": 1, "model": "timm/resnet18", "layers": {"fc": {"weight": 4, "activation": 8}}}
    return json.dumps({**tree, **changes})


# The file


@given(model=names, layers=st.dictionaries(names, layer_bits, max_size=6))
def test_policy_survives_its_file(model: str, layers: dict[str, LayerBits]) -> None:
    config = BitConfig(model=model, layers=layers)
    restored = parse_json(BitConfig, config.to_json(), "policy.json")
    assert restored == config
    assert list(restored.layers) == list(layers)  # in execution order


def test_policy_file_has_one_line_per_layer() -> None:
    config = BitConfig(model="timm/resnet18", layers={"conv1": W4A4, "layer1.0.conv1": W4A4})
    lines = config.to_json().splitlines()
    assert [line.strip() for line in lines[4:6]] == [
        '"conv1": {"weight":4,"activation":4},',
        '"layer1.0.conv1": {"weight":4,"activation":4}',
    ]


def test_missing_version_means_1() -> None:
    assert parse_json(BitConfig, '{"model": "m", "layers": {}}', "policy.json").schema_version == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (policy(comment="mine"), "unknown key 'comment'"),
        (policy(layers={"fc": {"weight": 4, "activation": 8, "group": 1}}), "unknown key 'layers.fc.group'"),
        (policy(layers={"fc": {"weight": 4}}), "key 'layers.fc.activation' is missing"),
        ('{"layers": {}}', "key 'model' is missing"),
        (policy(schema_version=2), "schema_version"),
        (policy(schema_version="1"), "schema_version"),
        (policy(layers={"fc": {"weight": 1, "activation": 8}}), "layers.fc.weight"),
        (policy(layers={"fc": {"weight": 9, "activation": 8}}), "layers.fc.weight"),
        (policy(layers={"fc": {"weight": 4, "activation": 32}}), "layers.fc.activation"),
        (policy(layers={"fc": {"weight": 4.0, "activation": 8}}), "layers.fc.weight"),
        (policy(layers={"fc": {"weight": 4.5, "activation": 8}}), "layers.fc.weight"),
        (policy(layers={"fc": {"weight": "4", "activation": 8}}), "layers.fc.weight"),
        (policy(layers={"fc": {"weight": True, "activation": 8}}), "layers.fc.weight"),
        (policy(layers=[1, 2]), "layers"),
        (policy()[:-1], "JSON"),
        ("", "JSON"),
    ],
)
def test_invalid_policy_error_names_the_place(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_json(BitConfig, text, "policy.json")
    assert str(refusal.value).startswith("policy.json: ")
    assert reason.lower() in str(refusal.value).lower()
    assert "\n" not in str(refusal.value)


def test_policy_is_immutable() -> None:
    config = BitConfig(model="m", layers={"fc": W4A4})
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"
    with pytest.raises(ValueError, match="frozen"):
        config.layers["fc"].weight = 8


# Fitting a network


def test_layer_order_does_not_matter() -> None:
    BitConfig(model="m", layers={"a": W4A4, "b": W4A4}).check_fits("m", ["b", "a"])


def test_mismatch_names_both_sides() -> None:
    config = BitConfig(model="timm/resnet18", layers={"a": W4A4, "old": W4A4})
    with pytest.raises(PolicyMismatch) as refusal:
        config.check_fits("timm/resnet50", ["a", "new"])
    message = str(refusal.value)
    for part in ("timm/resnet18", "timm/resnet50", "missing layers new", "unknown layers old"):
        assert part in message


def test_mismatch_names_only_the_differing_side() -> None:
    config = BitConfig(model="m", layers={"a": W4A4})
    with pytest.raises(PolicyMismatch, match="missing layers b") as refusal:
        config.check_fits("m", ["a", "b"])
    assert "alone" not in str(refusal.value)


def test_long_mismatch_is_truncated_and_counted() -> None:
    config = BitConfig(model="m", layers={})
    with pytest.raises(PolicyMismatch, match=r"n0, n1, n2, n3, n4 and 7 more"):
        config.check_fits("m", [f"n{k}" for k in range(12)])


def test_uniform_bits_keep_pins() -> None:
    pin = LayerBits(weight=8, activation=8)
    config = uniform("m", {"conv1": pin, "mid": None, "fc": pin}, W4A4)
    assert list(config.layers.items()) == [("conv1", pin), ("mid", W4A4), ("fc", pin)]


# Notations


@pytest.mark.parametrize("width", BITS)
def test_one_number_sets_both_operands(width: int) -> None:
    assert parse_bits(str(width)) == LayerBits(weight=width, activation=width)


@given(weight=widths(), activation=widths())
def test_bits_survive_their_notation(weight: int, activation: int) -> None:
    bits = LayerBits(weight=weight, activation=activation)
    assert parse_bits(str(bits)) == bits
    assert parse_bits(f" W{weight}A{activation} ") == bits


def test_float_operand_counts_as_32_bits() -> None:
    assert str(LayerBits(weight=None, activation=8)) == "w32a8"


@pytest.mark.parametrize(
    "text", ["", "four", "4.5", "-4", "w4", "a4", "w4a", "4a4", "w4 a4", "4,4", "w4a4a4"]
)
def test_invalid_bit_width_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a bit-width"):
        parse_bits(text)


@pytest.mark.parametrize("text", ["0", "1", "9", "32", "w1a4", "w4a9", "w16a16"])
def test_unsupported_bits_error_gives_the_range(text: str) -> None:
    with pytest.raises(ConfigError, match="2 to 8"):
        parse_bits(text)


@given(chosen=st.lists(widths(), min_size=1))
def test_candidates_are_sorted_and_unique(chosen: list[int]) -> None:
    assert parse_candidates(",".join(map(str, chosen))) == tuple(sorted(set(chosen)))
    assert parse_candidates(" , ".join(map(str, chosen))) == tuple(sorted(set(chosen)))


@pytest.mark.parametrize(
    "text", ["", ",", "2,", "2;3", "2 3", "1,2", "8,9", "2,-3", "2.0,3", "two", "²,3", "2,3,x"]
)
def test_invalid_candidates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`quantization\.candidates="):
        parse_candidates(text)


@given(text=st.text(max_size=8))
def test_arbitrary_text_parses_or_fails_cleanly(text: str) -> None:
    for parse in (parse_bits, parse_candidates, parse_quantity):
        try:
            parse(text)
        except ConfigError:
            continue


# Quantities

FACTORS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@given(
    whole=st.integers(0, 10**6),
    thousandths=st.integers(0, 999),
    unit=st.sampled_from(sorted(FACTORS)),
    suffix=st.sampled_from(["", "BOPs", " BOPs", "bops", " bitops"]),
    lower=st.booleans(),
)
def test_quantities_are_exact_integers(
    whole: int, thousandths: int, unit: str, suffix: str, lower: bool
) -> None:
    value = (whole * 1000 + thousandths) * FACTORS[unit] // 1000
    text = f"{whole}.{thousandths:03d}{unit.lower() if lower else unit}{suffix}"
    if value == 0:
        with pytest.raises(ConfigError, match="above zero"):
            parse_quantity(text)
    else:
        assert parse_quantity(text) == value


@given(value=st.integers(1000, 10**16 - 10**12))
def test_formatted_quantity_parses_back(value: int) -> None:
    text = format_quantity(value, "BOPs")
    assert abs(parse_quantity(text) - value) <= 0.0005 * value * (1 + 1e-9)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (34_714_419_200, "34.71 GBOPs"),
        (674_643_968, "674.6 MBOPs"),
        (1_857_611_104_256, "1.858 TBOPs"),
        (1_000, "1 KBOPs"),
        (999, "999 BOPs"),
        (0, "0 BOPs"),
    ],
)
def test_documented_quantities_parse(value: int, text: str) -> None:
    assert format_quantity(value, "BOPs") == text


@pytest.mark.parametrize(
    "text", ["", "34", "G", "-3G", "1e-9", "3 4G", "3GG", "3P", "nanG", "0x3G", ".5G", "1,5G", "3Gx4"]
)
def test_quantity_needs_number_and_unit(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a (budget|size): (add a unit|give a number with a unit)"):
        parse_quantity(text)
    with pytest.raises(ConfigError, match=r"`quantization.size`: .* is not a size"):
        parse_quantity(text, "size")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5MB", 5_000_000), ("5 mb", 5_000_000), ("5M", 5_000_000), ("2.5 KB", 2_500), ("148000 B", 148_000),
        ("7 bytes", 7), ("5MiB", 5 * 2**20), ("5 mib", 5 * 2**20), ("1.5Gi", 3 * 2**29), ("1TiB", 2**40),
    ],
)  # fmt: skip
def test_sizes_accept_decimal_and_binary_units(text: str, value: int) -> None:
    assert parse_quantity(text, "size") == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("500MB", "use `quantization.size=500MB`, or 500M for bit-operations"),
        ("500 mb", "use `quantization.size=500mb`, or 500M for bit-operations"),
        ("34B", "a size in bytes, not a number of bit-operations: use `quantization.size=34B`"),
        ("5MiB", "use `quantization.size=5MiB`, or 5M"),
        ("7Ki", "use `quantization.size=7Ki`"),
        ("500ms", "is a time, not"),
        ("20 us", "is a time, not"),
        ("5mJ", "is an energy, not"),
        ("3 W", "is a power, not"),
        ("30fps", "is a rate, not"),
        ("2GMACs", "a number of multiply-accumulates, not"),
        ("2 gmac", "w4a4"),
        ("3.6 GFLOPs", "a number of operations, not"),
        ("11M params", "use `quantization.size=5MB`"),
        ("50%", "is a ratio, not"),
        ("8x", "is a ratio, not"),
        ("4 bits", "use `quantization.bits=4`"),
    ],
)
def test_foreign_unit_suggests_the_right_option(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_quantity(text)
    assert str(refused.value).startswith("`quantization.bops`: ")
    assert says in str(refused.value)
    if "`quantization.size=" not in says:
        with pytest.raises(ConfigError, match=r"^`quantization.size`: .* not a size in bytes"):
            parse_quantity(text, "size")


@pytest.mark.parametrize("text", ["34GBOPs", "34 GBops", "34gbop", "34 Gbitops", "34G bit-operations"])
def test_bops_are_not_a_size(text: str) -> None:
    assert parse_quantity(text) == 34 * 10**9
    with pytest.raises(
        ConfigError, match=f"use `quantization.bops={''.join(text.split())}`, or 34G for bytes"
    ):
        parse_quantity(text, "size")
