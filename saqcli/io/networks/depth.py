"""Depth of the residual networks for 32 x 32 images: three stages of n blocks with two convolutions each."""


def blocks_per_stage(depth: int) -> int:
    """n of a network with ``depth`` = 6n + 2 layers.

    Raises:
        ValueError: depth is not 6n + 2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
    return blocks
