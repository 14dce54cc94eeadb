"""What ``saq search`` prints, as it is read back from the manifest of a search that has ended.

The rest of the manifest is for people; this is shown again by ``--resume``, so it must be whole.
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saqcli.quant.bits import LayerBits

Count = Annotated[int, Field(ge=0)]


class LayerRow(BaseModel):
    """What the picture of a policy needs of a layer; there is more beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    macs: Count
    bops: Count
    pinned: bool


class FrontRow(BaseModel):
    """A line of the table of a front."""

    model_config = ConfigDict(extra="allow", frozen=True)

    budget_bops: Count | None
    budget_bytes: Count | None
    bops: Count
    size_bytes: Count
    top1: float
    on_front: bool
    searcher: str
    uniform: str | None
    chosen: bool


class FrontTable(BaseModel):
    """The front of a search."""

    model_config = ConfigDict(extra="allow", frozen=True)

    images: Count
    float_top1: float | None
    points: list[FrontRow]


class SearchResults(BaseModel):
    """What is shown of a search; there is more beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    searcher: str
    policy: dict[str, LayerBits]
    layers: list[LayerRow]
    bops: Count
    size_bytes: Count
    budget_bops: Count | None
    budget_bytes: Count | None
    seconds: float
    scoring_top1: float | None
    front: FrontTable | None = None
    artifacts: dict[str, str]

    @model_validator(mode="after")
    def _of_one_network(self) -> Self:
        if {row.name for row in self.layers} != set(self.policy):
            raise ValueError("policy and layers are not of one network")
        return self
