"""The arithmetic of ONNX Runtime on codes, without the runtime: a file equals its twin bit by bit."""

from saqcli.verify.twin.operators import Machine
from saqcli.verify.twin.twin import Twin

__all__ = ["Machine", "Twin"]
