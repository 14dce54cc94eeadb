"""Everything a run can be told, in one strict object; ``config.json`` is it, resolved.

Settings come from five places, later ones winning: the defaults here, a recipe
(``saqcli/recipes/NAME.toml``), a file of settings, assignments ``section.key=value``, and the command's
own options. Running the resulting ``config.json`` again gives the same run. Unknown keys are errors.
"""

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from saqcli.errors import ConfigError, Problems
from saqcli.serialization import Misfit, parse_object, printable, read_json, read_text, read_toml

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BitWidth = Annotated[int, Field(ge=2, le=8)]
Widths = Annotated[tuple[BitWidth, ...], Field(min_length=1)]
WIDTHS = (2, 3, 4, 5, 6, 8)  # that are tried by default, in searches and in analyses; the help names them
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _as_typed(value: object) -> object:
    """A number as text: TOML reads ``bits = 4`` as one, and a missing unit is for ``units`` to say."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_typed)]


def _count_or_all(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise ValueError("give a number of at least 1, or all")


CountOrAll = Annotated[int | Literal["all"], PlainValidator(_count_or_all)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which network, and how its images are prepared. None leaves the choice to the network.

    ``weights_key`` chooses among several sets of tensors in ``weights``. With ``new_head`` the classifier starts random
    where the file has another number of classes than ``num_classes``.
    """

    name: str
    weights: str | None = None
    weights_key: str | None = None
    pretrained: bool = True
    num_classes: Positive | None = None
    new_head: bool = False
    in_chans: Positive | None = None
    kwargs: dict[str, Any] = {}
    input_size: Positive | tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class DataSection(_Section):
    """Which images, which classes they are of, and how they are fed.

    ``class_order`` is ``timm``, ``torchvision`` or a file of class names; None takes what the checkpoint, a file beside
    the folders, or the network's library says. ``class_map`` is a file from folders to classes. ``exif_transpose`` None
    is as a quantized model was trained, and false for a float one. ``augmentation`` "auto" is ``cifar`` (pad 4, crop,
    flip) up to 64 pixels and ``imagenet`` (random resized crop, flip) above. ``workers`` and ``eval_batch_size`` None
    decide by image size.
    """

    path: str | None = None
    batch_size: Positive = 128
    eval_batch_size: Positive | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    augmentation: Literal["auto", "imagenet", "cifar", "none"] = "auto"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    calibration_images: Positive = 512
    verify_images: CountOrAll = 500
    bad_images: Literal["refuse", "skip"] = "refuse"
    class_order: str | None = None
    class_map: str | None = None
    exif_transpose: bool | None = None


class QuantizationSection(_Section):
    """Which quantizers, and where the bits come from: ``bits``, a budget (``bops``, ``size`` in bytes), or ``policy``.

    ``candidates`` are the widths of weights and inputs together, unless ``activation_candidates`` are given for the
    inputs. ``pins`` narrow them by pattern of layer names: ``4``, ``3-6``, ``w4a8``; of several that match, the last.
    ``correct_bias`` and ``recalibrate_bn`` take back what quantization moved on average, after calibration.
    """

    bits: Text | None = None
    bops: Text | None = None
    size: Text | None = None
    policy: str | None = None
    searcher: str = "error"
    candidates: Widths = WIDTHS
    activation_candidates: Widths | None = None
    pins: dict[str, Text] = {}
    quantizer: str = "clip"
    weight_grid: Literal["auto", "paper", "zero"] = "auto"
    granularity: Literal["channel", "tensor"] = "channel"
    weight_normalization: bool = False
    clip_init: Literal["error", "paper"] = "error"
    quantize_attention: bool = False
    correct_bias: bool = False
    recalibrate_bn: bool = True


class ProxySection(_Section):
    """A small data set that is searched on in the place of the network's own, and the network built for it.

    None takes what the network has; ``data`` None is the path of the data section, ``num_classes`` None is the number
    of its class folders. ``epochs`` of training in floating point come first, None for one if the classifier is new.
    """

    data: str | None = None
    num_classes: Positive | None = None
    input_size: Positive | None = None
    weights: str | None = None
    weights_key: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    epochs: Annotated[int, Field(ge=0)] | None = None


class SearchSection(_Section):
    """What a search looks at, and how it trains.

    ``images`` of ``classes`` classes are drawn from the training split by seed, None for all. The share ``held_out`` of
    them is not trained on; ``scoring_images`` of that compare configurations. ``epochs`` and ``rho`` None are the
    searcher's own; ``options`` hold further keyword arguments, by searcher. ``pareto`` budgets make a front.
    """

    epochs: Rate | None = None
    rho: NotNegative | None = None
    images: Positive | None = None
    classes: Positive | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.5
    scoring_images: Positive = 2048
    optimizer: str = "sgd"
    lr: Rate = 0.01
    weight_decay: NotNegative = 1e-4
    pareto: Annotated[int, Field(ge=0)] = 0
    proxy: ProxySection | None = None
    options: dict[str, dict[str, Any]] = {}


class TrainingSection(_Section):
    """How the quantized network is fine-tuned.

    ``clip_lr_factor`` scales the learning rate of clipping levels; they have no weight decay unless
    ``decay_clips``. ``sharpness_batch`` images share one perturbation. ``rho`` None takes the paper's radius
    for the mean bit-width. ``minimizer`` holds further keyword arguments of the method.

    The ascent can be made cheaper: only every ``sam_interval``-th step, going on in between with ``sam_reuse`` times
    what the last one added; on ``ascent_fraction`` of the images; in bfloat16.

    ``micro_batch`` images are in one forward pass, None for all that share a perturbation. ``skip_steps`` in a row are
    left out where the loss is no number, before training stops. ``clip_grad`` is the
    largest joint norm of the gradients. ``ema_decay`` 0 is no averaging of weights. ``mixup`` and ``cutmix`` are the
    alphas of their beta distributions, 0 for none.

    ``keep`` says which state is exported: that of the ``last`` epoch, or the ``best`` one on the validation images, of
    which the calibrated one is the first.
    """

    method: str = "saq"
    epochs: Annotated[int, Field(ge=0)] = 3
    optimizer: str = "sgd"
    lr: Rate = 0.005
    momentum: NotNegative = 0.9
    weight_decay: NotNegative = 1e-4
    clip_lr_factor: NotNegative = 1.0
    decay_clips: bool = False
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup_epochs: NotNegative = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rho: NotNegative | None = None
    rho_unit: Literal["deviation", "absolute"] = "deviation"
    sharpness_batch: Positive = 128
    sam_interval: Positive = 1
    sam_reuse: NotNegative = 0.0
    ascent_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    ascent_precision: Literal["same", "bfloat16"] = "same"
    micro_batch: Positive | None = None
    skip_steps: Annotated[int, Field(ge=0)] = 10
    clip_grad: Rate | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    distill: bool = False
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    distill_temperature: Rate = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    keep: Literal["last", "best"] = "last"
    minimizer: dict[str, Any] = {}


class RunSection(_Section):
    """Seed, device, whether only kernels that always give the same are used, and how often to save."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    deterministic: bool = False
    checkpoint_minutes: Rate = 10.0


class ExportSection(_Section):
    """The ONNX files that ``saq quantize`` ends with, one a style, the first as ``model.onnx``; () for none."""

    styles: tuple[str, ...] = ("qdq",)


class RunConfig(_Section):
    """All of it. This is ``config.json``."""

    schema_version: Literal[1] = 1
    recipe: str = "quick"
    model: ModelSection
    data: DataSection = DataSection()
    quantization: QuantizationSection = QuantizationSection()
    search: SearchSection = SearchSection()
    training: TrainingSection = TrainingSection()
    export: ExportSection = ExportSection()
    run: RunSection = RunSection()

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return self.model_dump_json(indent=2) + "\n"


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("saqcli") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def resolve(
    *,
    recipe: str | None = None,
    file: Path | None = None,
    assignments: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration that defaults, recipe, file, assignments and options make together.

    Args:
        recipe: name of a recipe; None takes the file's, or ``quick``.
        file: TOML or JSON.
        assignments: ``section.key`` to text; read as TOML where it is, else as a string.
        options: ``section.key`` to value; None values were not given.

    Raises:
        ConfigError: all that is wrong: a file that cannot be read, unknown keys, values of the wrong kind.
    """
    problems = Problems()
    config = resolve_into(problems, recipe=recipe, file=file, assignments=assignments, options=options)
    problems.check()
    assert config is not None
    return config


def resolve_into(
    problems: Problems,
    *,
    recipe: str | None,
    file: Path | None,
    assignments: Mapping[str, str] | None,
    options: Mapping[str, Any] | None,
) -> RunConfig | None:
    """As ``resolve``, with what is wrong added to ``problems``; made of the rest, None where there is none.

    A model that was not named has an empty name.
    """
    given, where = (problems.attempt(_read, file), f" in {file}") if file else ({}, "")
    if given is None:  # nothing can be said of the rest
        return None
    name = recipe or str(given.get("recipe") or "quick")
    tree: dict[str, Any] = {}
    base = problems.attempt(_read_recipe, name, "" if recipe else where)
    name = name if base is not None else "quick"
    _merge(tree, _read_recipe(name, "") if base is None else base)
    _merge(tree, given)
    tree["recipe"] = name
    for key, text in (assignments or {}).items():
        problems.attempt(_assign, tree, key, _value(text))
    for key, value in (options or {}).items():
        if value is not None:
            problems.attempt(_assign, tree, key, value)
    model = tree.setdefault("model", {})
    if not isinstance(model, dict) or "name" not in model:
        problems.add(
            ConfigError(
                f"no model was named{where}: give `model.name`, such as timm/resnet18, or a `config` with one"
            )
        )
        tree["model"] = {**(model if isinstance(model, dict) else {}), "name": ""}
    return _checked(problems, tree, str(file) if file else "configuration")


def _checked(problems: Problems, tree: dict[str, Any], source: str) -> RunConfig | None:
    """``tree`` as settings; what does not fit is added to ``problems`` and left at its default."""
    try:
        return parse_object(RunConfig, tree, source)
    except Misfit as misfit:
        problems.add(misfit)
        for place in misfit.places:
            _remove(tree, place)
    except ConfigError as error:
        problems.add(error)
        return None
    try:
        return parse_object(RunConfig, tree, source)
    except ConfigError:
        return None


def _remove(tree: dict[str, Any], place: Sequence[int | str]) -> None:
    """Remove the setting at ``place``, or the one that it lies in: a section's key, or a key of the top."""
    inner = tree.get(str(place[0])) if place else None
    if len(place) > 1 and isinstance(inner, dict):
        inner.pop(str(place[1]), None)
    elif place:
        tree.pop(str(place[0]), None)


def _read_recipe(name: str, where: str) -> dict[str, Any]:
    if name not in recipes():
        name = printable(name, 60)
        raise ConfigError(f"there is no recipe {name!r}{where}: choose from {', '.join(recipes())}")
    return tomllib.loads((files("saqcli") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))


def _read(file: Path) -> dict[str, Any]:
    text = read_text(file, str(file), most=2**18)
    tree = (read_json if file.suffix.lower() == ".json" else read_toml)(text, str(file))
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} cannot be read as a configuration: it holds no sections")
    for name, field in RunConfig.model_fields.items():
        if hasattr(field.annotation, "model_fields") and not isinstance(tree.get(name, {}), dict):
            raise ConfigError(f"{file}: {name} is a section: give it keys and values")
    return tree


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    if not dot:
        raise ConfigError(f"`assignments={key}`: name a section and a key, such as training.lr=0.01")
    target: Any = tree.setdefault(section, {})
    *path, last = name.split(".")
    for part in path:
        target = target.setdefault(part, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise ConfigError(f"`assignments={key}`: there is nothing below {key.rpartition('.')[0]}")
    target[last] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, a number or a nesting without end
        return text
