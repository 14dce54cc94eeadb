"""What reaches the input quantizers of a quantized model, as it is.

``quant.calibrate`` looks at the float network; here every layer computes with its own bits, and the values are
noted just before they are rounded.
"""

import torch
from torch import Tensor, nn

from saqcli.algorithms.instruments.base import Subject, seeded
from saqcli.progress import Task
from saqcli.quant.calibrate import InputStatistics


@torch.no_grad()
def observe_inputs(subject: Subject, seed: int, task: Task) -> dict[str, InputStatistics]:
    """Range and a sample of the values at the input of every layer, over all images.

    Args:
        subject: left as it is.
        seed: of the draw of sample values.
        task: told about every batch.
    """
    statistics = {name: InputStatistics() for name in subject.layers}
    handles = []
    for name, layer in subject.layers.items():
        generator = seeded(seed, "inputs", name)

        def note(
            module: nn.Module,
            arguments: tuple[Tensor, ...],
            name: str = name,
            generator: torch.Generator = generator,
        ) -> None:
            statistics[name].update(arguments[0], generator)

        handles.append(layer.input_quantizer.register_forward_pre_hook(note))
    try:
        for images, _ in subject.batches:
            subject.model(images)
            task.advance(images=len(images))
    finally:
        for handle in handles:
            handle.remove()
    return statistics
