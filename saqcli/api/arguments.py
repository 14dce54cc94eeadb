"""Checks of arguments that several public functions share: quantizers and bit-widths."""

from collections.abc import Iterable

from saqcli.errors import ConfigError
from saqcli.quant.bits import MAX_BITS, MIN_BITS
from saqcli.quant.calibration import ClipInit
from saqcli.quant.clip_init import SQUARED
from saqcli.quant.convert import Scheme
from saqcli.quant.grid import WeightGrid
from saqcli.quant.quantizers.base import Granularity
from saqcli.quant.search_space import Candidates
from saqcli.serialization import parse_object
from saqcli.target import Target


def scheme_of(
    quantizer: str,
    weight_quantizer: str | None,
    activation_quantizer: str | None,
    weight_grid: WeightGrid,
    granularity: Granularity,
    weight_normalization: bool,
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


def widths_of(candidates: Iterable[int], activation_candidates: Iterable[int] | None = None) -> Candidates:
    """The bit-widths that a layer may have.

    Raises:
        ConfigError: none, or other than whole numbers from 2 to 8.
    """
    weights = _widths("candidates", candidates)
    if activation_candidates is None:
        return Candidates(weights)
    return Candidates(weights, _widths("activation_candidates", activation_candidates))


def _widths(name: str, candidates: Iterable[int]) -> tuple[int, ...]:
    given = tuple(candidates)
    if not given or not all(type(bits) is int and MIN_BITS <= bits <= MAX_BITS for bits in given):
        raise ConfigError(
            f"`{name}={given!r}`: give bit-widths from {MIN_BITS} to {MAX_BITS}, such as (2, 4, 8)"
        )
    return tuple(sorted(set(given)))
