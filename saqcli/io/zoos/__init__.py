"""The three libraries that networks come from, behind one contract.

timm and torchvision agree on little: how a name carries its weights, where preprocessing is kept, what
happens to a classifier of another size. Those differences end here. Neither is imported before it is needed.
"""

from saqcli.io.zoos.base import Architecture as Architecture
from saqcli.io.zoos.base import Zoo as Zoo
from saqcli.io.zoos.from_papers import Saq
from saqcli.io.zoos.from_timm import Timm
from saqcli.io.zoos.from_torchvision import TorchVision

ZOOS: dict[str, Zoo] = {"timm": Timm(), "torchvision": TorchVision(), "saq": Saq()}  # in order of search
