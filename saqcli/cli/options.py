"""Options with one name and one meaning wherever they apply."""

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.errors import ConfigError, Problems

if TYPE_CHECKING:
    from saqcli.config import DataSection, ModelSection

MODEL = "Model"
IMAGES = "Images"
TRAINING = "Training"
RUN = "Run"
BENCH = "Speed"

_MODEL_HELP = (
    "Network: `resnet18` (timm first, then torchvision), `timm/NAME`, `torchvision/NAME` or `saq/NAME`; "
    "`NAME.TAG` for weights other than the default. `saq models` lists them."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
OptionalModel = Annotated[str | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Local float weights: .safetensors, .pth, .pt or .th; loaded without running code.",
        rich_help_panel=MODEL,
    ),
]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        "--weights-key",
        metavar="KEY",
        help="Which tensors of --weights, where it holds several sets: state_dict_ema, callbacks.ema "
        "[default: averaged weights where there are some, as in timm]",
        rich_help_panel=MODEL,
    ),
]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--no-pretrained",
        help="Published weights, or random ones [default: --pretrained]",
        rich_help_panel=MODEL,
    ),
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of classes [default: that of the weights]",
        rich_help_panel=MODEL,
    ),
]
NewHead = Annotated[
    bool | None,
    typer.Option(
        "--new-head",
        help="Start with a random classifier where --weights has another number of classes than --num-classes.",
        rich_help_panel=MODEL,
    ),
]
InChans = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Channels of the images [default: 3]", rich_help_panel=MODEL),
]
ModelKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="K=V,...",
        help="Arguments for the model's builder, such as `pad_type=same,bn_eps=0.001`.",
        rich_help_panel=MODEL,
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIDE|HxW",
        help="Size of the images in pixels: `224`, or `256x192` [default: as the network expects]",
        rich_help_panel=IMAGES,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Mean of each channel, of pixels scaled to 0..1 [default: as the network expects]",
        rich_help_panel=IMAGES,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Standard deviation of each channel, of pixels scaled to 0..1 [default: as the network expects]",
        rich_help_panel=IMAGES,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder with `train/` and `val/`, one folder per class in each; or timm's `torch/cifar100`, `hfds/NAME`, "
        "`wds/DIR`.",
        rich_help_panel=IMAGES,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Images per training step [default: 128]", rich_help_panel=IMAGES),
]
EvalBatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Images per batch [default: 256 up to 64 pixels, else 64]",
        rich_help_panel=IMAGES,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Processes that read images [default: none up to 64 pixels, else one per core, at most 8]",
        rich_help_panel=IMAGES,
    ),
]
BadImages = Annotated[
    str | None,
    typer.Option(
        metavar="refuse|skip",
        help="What to do with an image that cannot be read [default: refuse]",
        rich_help_panel=IMAGES,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Device to compute on: cpu, cuda or cuda:1 [default: the GPU if there is one, else the CPU]",
    ),
]
ClassOrder = Annotated[
    str | None,
    typer.Option(
        metavar="timm|torchvision|FILE",
        help="How class folders are numbered: timm (2 before 10), torchvision (as text) or a file of names [default: "
        "that of the run, of the checkpoint or of a class_to_idx file beside the folders, else of the model's library]",
        rich_help_panel=IMAGES,
    ),
]
ClassMap = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Which class each folder is: lines FOLDER CLASS, CSV or a JSON object; a class is a name, a synset or an "
        "index.",
        rich_help_panel=IMAGES,
    ),
]
ExifTranspose = Annotated[
    bool | None,
    typer.Option(
        "--exif-transpose/--no-exif-transpose",
        help="Turn images as their EXIF orientation says [default: as the run did, else --no-exif-transpose, as timm "
        "and torchvision do]",
        rich_help_panel=IMAGES,
    ),
]
VerifyImages = Annotated[
    str | None,
    typer.Option(
        metavar="N|all",
        help="Validation images to verify exported files on, drawn evenly over the classes [default: 500]",
        rich_help_panel=IMAGES,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an unexpected error.")]


def parse_numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """``0.5,0.5,0.5`` as numbers.

    Raises:
        ConfigError: something else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} {text}: give numbers separated by commas, such as 0.485,0.456,0.406"
        ) from None


def parse_counts(text: str | None, option: str) -> tuple[int, ...] | None:
    """``1,8`` as whole numbers of at least 1, each once, in their order.

    Raises:
        ConfigError: something else.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise ConfigError(
            f"{option} {text}: give whole numbers of at least 1 separated by commas, such as 1,8"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_count_or_all(text: str | None, option: str) -> int | str | None:
    """``500`` as a number of at least 1, or ``all``.

    Raises:
        ConfigError: something else.
    """
    if text is None or text == "all":
        return text
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text.strip()):
        raise ConfigError(f"{option} {text}: give a number of at least 1, or all")
    return int(text)


def parse_size(text: str | None) -> int | tuple[int, ...] | None:
    """``224`` as one side, ``256x192`` as height and width.

    Raises:
        ConfigError: something else.
    """
    if text is None:
        return None
    sides = text.strip().lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", side) for side in sides):
        raise ConfigError(
            f"--input-size {text}: give one side such as 224, or height and width such as 256x192"
        )
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def parse_assignments(text: str | None, option: str) -> dict[str, Any] | None:
    """``a=1,b=same,c=[2,3]`` as a dictionary; values are numbers, booleans or lists where they look like it.

    Raises:
        ConfigError: a part without ``=``.
    """
    if text is None:
        return None
    values: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text):  # not at commas within a list
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"{option} {text}: give NAME=VALUE pairs separated by commas, such as pad_type=same"
            )
        values[key.strip()] = _literal(value.strip())
    return values


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text.lower() if text.lower() in ('true', 'false') else text}")[
            "value"
        ]
    except (ValueError, RecursionError):  # no TOML, a number or a nesting without end
        return text


def parse_pins(texts: list[str] | None) -> dict[str, str] | None:
    """``PATTERN=BITS`` pairs as a dictionary, in their order.

    Raises:
        ConfigError: a text without ``=``.
    """
    if not texts:
        return None
    pins = {}
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern.strip():
            raise ConfigError(f"--pin {text}: give PATTERN=BITS, such as 'layer4.*=8' or '*.conv1=3-6'")
        pins[pattern.strip()] = bits.strip()
    return pins


def model_options(
    problems: Problems,
    *,
    weights: Path | None,
    weights_key: str | None,
    pretrained: bool | None,
    num_classes: int | None,
    in_chans: int | None,
    model_kwargs: str | None,
    input_size: str | None,
    mean: str | None,
    std: str | None,
    new_head: bool | None = None,
) -> dict[str, Any]:
    """The given ones as keys of the configuration's ``model`` section; None where not given.

    What cannot be read is added to ``problems``.
    """
    return {
        "weights": None if weights is None else str(weights),
        "weights_key": weights_key,
        "pretrained": pretrained,
        "num_classes": num_classes,
        "new_head": new_head,
        "in_chans": in_chans,
        "kwargs": problems.attempt(parse_assignments, model_kwargs, "--model-kwargs"),
        "input_size": problems.attempt(parse_size, input_size),
        "mean": problems.attempt(parse_numbers, mean, "--mean"),
        "std": problems.attempt(parse_numbers, std, "--std"),
    }


def model_section(problems: Problems, name: str, **options: Any) -> "ModelSection":
    """The ``model`` section of the configuration; ``options`` as for ``model_options``."""
    from saqcli.config import ModelSection
    from saqcli.serialization import parse_object

    settings = {"name": name, **given(model_options(problems, **options))}
    section = problems.attempt(parse_object, ModelSection, settings, "options")
    return section or ModelSection(name=name)


def data_section(problems: Problems, **settings: Any) -> "DataSection":
    """The ``data`` section of the configuration; None where not given."""
    from saqcli.config import DataSection
    from saqcli.serialization import parse_object

    section = problems.attempt(parse_object, DataSection, given(settings), "options")
    return section or DataSection(path=settings.get("path"))


def parse_widths(
    problems: Problems, text: str | None, setting: str = "quantization.candidates"
) -> tuple[int, ...] | None:
    """``2,3,4`` as bit-widths; None where not given, or where it is added to ``problems``."""
    from saqcli.quant.bits import parse_candidates

    return None if text is None else problems.attempt(parse_candidates, text, setting)


def folder_of_bits(bits: str) -> str:
    """Bits, or a budget, as a part of a folder's name: ``w4a4`` for ``4``."""
    bits = "".join(bits.split()).lower()
    return f"w{bits}a{bits}" if bits.isdigit() else bits


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that were not given."""
    return {name: value for name, value in options.items() if value is not None}
