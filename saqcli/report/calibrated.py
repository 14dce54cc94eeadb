"""The network of a run as calibration left it, in ``network.json``: costs of layers, and how well their grids fit."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from saqcli._version import __version__
from saqcli.analysis.distributions import Operand, operand_of
from saqcli.errors import ConfigError
from saqcli.models.preprocessing import Preprocessing
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.layer import quantized_layers
from saqcli.quant.network import Network
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import json_text, write_text

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class OperandFit(BaseModel):
    """How well a grid fits the values of a layer's weights or inputs.

    Attributes:
        error: squared error divided by the squared values.
        clipped: share of values beyond the outermost codes.
        used: share of the codes that occur.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    clipped: Share
    used: Share

    @classmethod
    def of(cls, operand: Operand | None) -> "OperandFit | None":
        """The figures of ``operand``; None in floating point."""
        if operand is None:
            return None
        return cls(error=operand.error, clipped=operand.clipped, used=operand.used)


class CalibratedLayer(BaseModel):
    """A layer: its costs, and the fit of its grids. Operands in floating point have none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    macs: Count
    weights: Count
    bops: Count
    bytes: Count
    pinned: bool
    weight_fit: OperandFit | None
    input_fit: OperandFit | None


class CalibratedNetwork(BaseModel):
    """The content of ``network.json``.

    Attributes:
        schema_version: version of the file format.
        saq_version: version that wrote the file.
        model: canonical name of the network.
        classes: number of class scores.
        preprocessing: of its images, as in ``Preprocessing.to_dict``.
        layers: in execution order, at the bits of the policy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    saq_version: str
    model: str
    classes: Count
    preprocessing: dict[str, Any]
    layers: list[CalibratedLayer]

    @field_validator("preprocessing")
    @classmethod
    def _is_preprocessing(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            return Preprocessing.from_dict(values).to_dict()
        except ConfigError as error:
            raise ValueError(str(error)) from None


def write_network(
    run: RunDirectory,
    network: Network,
    preprocessing: Preprocessing,
    classes: int,
    policy: BitConfig,
    statistics: Mapping[str, InputStatistics],
) -> None:
    """Write ``network.json``.

    Args:
        run: whose directory gets it.
        network: with quantizers fitted at the bits of ``policy``.
        preprocessing: of its images.
        classes: number of class scores.
        policy: bits of every layer.
        statistics: of the inputs that the quantizers were fitted to.
    """
    layers = quantized_layers(network.model)
    rows = []
    for cost in network.costs.layers:
        layer, bits = layers[cost.name], policy.layers[cost.name]
        inputs = statistics[cost.name].samples.to(layer.latent_weight())
        rows.append(
            CalibratedLayer(
                name=cost.name,
                kind=cost.kind,
                macs=cost.macs + cost.product_macs,
                weights=cost.weight_count,
                bops=cost.bops(bits),
                bytes=cost.size(bits),
                pinned=bits == cost.pinned,
                weight_fit=OperandFit.of(operand_of(layer.weight_quantizer, layer.effective_weight())),
                input_fit=OperandFit.of(operand_of(layer.input_quantizer, inputs)),
            )
        )
    kept = CalibratedNetwork(
        saq_version=__version__,
        model=network.name,
        classes=classes,
        preprocessing=preprocessing.to_dict(),
        layers=rows,
    )
    write_text(run.network_path, json_text(kept.model_dump(mode="json"), indent=1) + "\n")
