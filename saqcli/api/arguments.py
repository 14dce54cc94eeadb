"""Checks of arguments that several public functions share: quantizers and bit-widths."""

from collections.abc import Iterable, Mapping
from typing import Literal

from saqcli.errors import ConfigError
from saqcli.quant.bits import MAX_BITS, MIN_BITS
from saqcli.quant.calibration import ClipInit
from saqcli.quant.clip_init import SQUARED
from saqcli.quant.convert import Scheme
from saqcli.quant.cost import CostModel
from saqcli.quant.grid import WeightGrid
from saqcli.quant.quantizers.base import Granularity
from saqcli.quant.search_space import Candidates, SearchSpace, parse_rules, search_space
from saqcli.serialization import parse_object
from saqcli.target import Target


def scheme_of(
    quantizer: str,
    weight_quantizer: str | None,
    activation_quantizer: str | None,
    weight_grid: WeightGrid,
    granularity: Granularity,
    weight_normalization: bool,
    restore_deviation: bool,
    clip_init: ClipInit = "error",
    error_power: float = SQUARED,
    target: Target | None = None,
    short_steps: int | None = None,
) -> Scheme:
    """The quantizers that the keywords of a public function name.

    Raises:
        ConfigError: an unknown quantizer or value, or options that the quantizers or the target do not support.
    """
    given = {
        "quantizer": quantizer,
        "weight_quantizer": weight_quantizer,
        "activation_quantizer": activation_quantizer,
        "weight_grid": weight_grid,
        "granularity": granularity,
        "weight_normalization": weight_normalization,
        "restore_deviation": restore_deviation,
        "clip_init": clip_init,
        "error_power": error_power,
        "short_steps": short_steps,
    }
    if target is not None:
        given["target"] = target.name
    scheme = parse_object(Scheme, given, "the quantizers", ConfigError)
    scheme.check()
    if target is not None:
        target.check_scheme(scheme)
    return scheme


def widths_of(
    candidates: Iterable[int],
    activation_candidates: Iterable[int] | Literal["same", "tied"] | None = "tied",
    target: Target | None = None,
) -> Candidates:
    """The bit-widths that a layer may have; of those for both, a target with other widths of inputs unties these.

    Raises:
        ConfigError: none, or other than whole numbers from 2 to 8, or none that the target runs.
    """
    weights = _widths("candidates", candidates)
    given = "tied" if activation_candidates is None else activation_candidates
    tied = given == "tied"
    inputs = weights if given in ("same", "tied") else _widths("activation_candidates", given)
    if target is not None:
        weights, inputs = target.candidates(weights, "weights"), target.candidates(inputs, "inputs")
    return Candidates(weights, None if tied and weights == inputs else inputs)


def space_for(
    name: str, costs: CostModel, candidates: Candidates, pins: Mapping[str, str], target: Target
) -> SearchSpace:
    """The search space of the network ``name``, all of which the target can run.

    Raises:
        ConfigError: pins that match no layer, or leave a layer without options.
        UnsupportedModel: the target cannot run bits of a layer that a pin allows.
    """
    space = search_space(name, costs, candidates, parse_rules(pins))
    target.check_policy(space.fixed)
    for decision in space.decisions:
        for option in decision.options:
            target.check_policy(dict.fromkeys((layer.name for layer in decision.members), option))
    return space


def _widths(name: str, candidates: Iterable[object]) -> tuple[int, ...]:
    given = tuple(candidates)
    widths = [bits for bits in given if type(bits) is int and MIN_BITS <= bits <= MAX_BITS]
    if not given or len(widths) < len(given):
        shown = candidates if isinstance(candidates, str) else given
        raise ConfigError(
            f"`{name}={shown!r}`: give bit-widths from {MIN_BITS} to {MAX_BITS}, such as (2, 4, 8)"
        )
    return tuple(sorted(set(widths)))
