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
    scoring_top1: float | None
    artifacts: dict[str, str]

    @model_validator(mode="after")
    def _of_one_network(self) -> Self:
        if {row.name for row in self.layers} != set(self.policy):
            raise ValueError("policy and layers are not of one network")
        return self
