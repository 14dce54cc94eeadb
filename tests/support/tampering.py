"""Metadata of a quantized ``conv_bn`` that contradicts itself, its network, or its schema."""

from collections.abc import Callable
from typing import Any


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        facts[keys[-1]] = to

    return change


def _drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        del facts[keys[-1]]

    return change


FOUR = {"weight": 4, "activation": 4}
TAMPERED: dict[str, Callable[[dict[str, Any]], None]] = {
    "newer_schema": _set("schema_version", to=3),
    "newer_policy": _set("policy", "schema_version", to=2),
    "unknown_key": _set("surprise", to=1),
    "no_policy": _drop("policy"),
    "no_scheme": _drop("scheme"),
    "no_signs": _set("signed", to={}),
    "one_sign_missing": _drop("signed", "3"),
    "sign_is_no_boolean": _set("signed", "0", to="perhaps"),
    "layer_missing": _drop("policy", "layers", "3"),
    "layer_unknown": _set("policy", "layers", "elsewhere", to=FOUR),
    "fewer_bits": _set("policy", "layers", "3", "weight", to=3),
    "more_bits": _set("policy", "layers", "3", "weight", to=8),
    "no_bits": _set("policy", "layers", "3", "weight", to=None),
    "bits_out_of_range": _set("policy", "layers", "3", "weight", to=9),
    "bits_are_text": _set("policy", "layers", "3", "weight", to="4"),
    "other_grid": _set("scheme", "weight_grid", to="zero"),
    "unknown_grid": _set("scheme", "weight_grid", to="hexagonal"),
    "other_granularity": _set("scheme", "granularity", to="tensor"),
    "unknown_quantizer": _set("scheme", "quantizer", to="magic"),
    "routed_parent_unknown": _set("routed", to={"elsewhere": ["0"]}),
    "routed_child_unknown": _set("routed", to={"": ["elsewhere"]}),
    "routed_child_no_layer": _set("routed", to={"": ["1"]}),
}
