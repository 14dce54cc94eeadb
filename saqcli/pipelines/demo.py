"""``saq demo``: train, quantize and export offline, on scikit-learn's digits.

data       1,797 images of 8 x 8 pixels (UCI ML hand-written digits), written as PNG files
train      a float ResNet-20
quantize   as ``saq quantize``, under a budget
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from saqcli.config import RunConfig, resolve
from saqcli.pipelines.bits import budget_of, check_bits, space_of
from saqcli.pipelines.quantize import quantize
from saqcli.pipelines.setup import load_float, open_images, wrap_and_trace
from saqcli.process_group import pick_device
from saqcli.progress import SILENT, Progress
from saqcli.random_state import seed_everything
from saqcli.runs.tracking import check_trackers
from saqcli.serialization import make_folder, replacing
from saqcli.training.optimizer import in_float
from saqcli.training.trainer import Trainer
from saqcli.units import counted

MODEL = "saq/resnet20"
SIDE = 16  # pixels; the digits have 8 and are doubled
PIXEL_MEAN, PIXEL_STD = 0.305, 0.376  # of pixels scaled to 0..1
VALIDATION_SHARE = 5  # every fifth image of a class is in the validation split
FLOAT_EPOCHS, FLOAT_LR = 12, 0.05


def demo(
    run_dir: Path, *, bops: str, epochs: int, seed: int, progress: Progress, track: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the demo in ``run_dir``, replacing an earlier one; returns the results of ``quantize``."""
    data, weights, quantized = (run_dir / name for name in ("digits", "float.safetensors", "quantized"))
    config = demo_config(data, weights, bops=bops, epochs=epochs, seed=seed, track=track)
    check_trackers(config.run.track)
    check_budget(config)
    progress.note(f"writing {counted(write_digits(data), 'handwritten digit')} to {data}")
    progress.note(f"training a float {MODEL} for {counted(FLOAT_EPOCHS, 'epoch')}")
    train_float(config, weights, progress)
    progress.note(f"quantizing it under a budget of {bops} BOPs")
    result = quantize(config, quantized, overwrite=True, progress=progress)
    return result.to_dict(quantized)


def check_budget(config: RunConfig) -> None:
    """Check the budget before the float network is trained.

    Raises:
        SaqError: it is invalid, or below the smallest reachable cost.
    """
    check_bits(config.quantization)
    section = config.model.model_copy(update={"weights": None, "pretrained": False})
    network = wrap_and_trace(load_float(section, SILENT))
    space_of(config.quantization, network).check_reachable(budget_of(config.quantization, network))


def demo_config(
    data: Path, weights: Path, *, bops: str, epochs: int, seed: int, track: Sequence[str] = ()
) -> RunConfig:
    """The configuration of the quantization, without augmentation, since digits must not be flipped."""
    return resolve(
        options={
            "model.name": MODEL,
            "model.weights": str(weights),
            "model.num_classes": 10,
            "model.in_chans": 1,
            "model.input_size": SIDE,
            "model.mean": (PIXEL_MEAN,),
            "model.std": (PIXEL_STD,),
            "data.path": str(data),
            "data.augmentation": "none",
            "data.batch_size": 64,
            "quantization.bops": bops,
            "training.epochs": epochs,
            "run.seed": seed,
            "run.track": tuple(track),
        }
    )


def write_digits(folder: Path) -> int:
    """Write the digits as ``folder/{train,val}/CLASS/INDEX.png``; returns their number."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if seen[label] % VALIDATION_SHARE == 0 else "train"
        seen[label] += 1
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype("uint8"))
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    return len(digits.images)


def train_float(config: RunConfig, weights: Path, progress: Progress, *, epochs: int = FLOAT_EPOCHS) -> None:
    """Train the float network from random weights and save it to ``weights``."""
    device = pick_device(config.run.device)
    seed_everything(config.run.seed)
    section = config.model.model_copy(update={"weights": None, "pretrained": False})
    loaded = load_float(section, progress)
    model = loaded.model.to(device)
    images = open_images(config, loaded, device)
    training = in_float(config.training, config.data.batch_size, lr=FLOAT_LR, epochs=epochs, warmup_epochs=1)
    size = max(images.preprocessing.input_size[1:])
    Trainer(
        model,
        images.training(),
        training,
        num_classes=loaded.num_classes,
        image_size=size,
        title="float epoch",
        progress=progress,
    ).fit()
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    make_folder(weights.parent)
    with replacing(weights) as temporary:
        temporary.write_bytes(save(state))
