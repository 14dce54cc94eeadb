"""All settings of a run, in one strict object; ``config.json`` holds it, resolved.

Settings come from six places, later ones win: the defaults here, a recipe (``saqcli/recipes/NAME.toml``), a target
(``saqcli/targets/NAME.toml``), a configuration file, assignments (``section.key=value``), and the options of the
command. Running the resulting ``config.json`` again gives the same run. Unknown keys are errors.

A setting stands here only: a field that is annotated with an ``Option`` is an option of the commands that take its
section. ``saqcli.cli.options`` makes the command line from these, help and completion included.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from saqcli.errors import BuilderError, ConfigError, Problems
from saqcli.option import (
    BITS,
    DATA,
    EFFICIENCY,
    EXPORT,
    GENERAL,
    MODEL,
    RECONSTRUCTION,
    REGULARIZATION,
    RUN,
    SEARCH,
    TRAINING,
    Option,
)
from saqcli.serialization import Misfit, named_path, parse_object, printable, read_json, read_text, read_toml

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

DEFAULT_RECIPE = "quick"
_MOST_TABLE = 2**22  # bytes of a table of costs that a run records


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("saqcli") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def _names(text: str) -> dict[str, str]:
    return dict.fromkeys(text.split(), "")


_QUANTIZERS = _names("clip lsq lsq_plus asymmetric pact dorefa log2 adaptive")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    panel: ClassVar[str]  # heading of its options in the help


class ModelSection(_Section):
    """The network and the preparation of its images; None leaves a choice to the network.

    ``weights_key`` chooses one of several sets of tensors in ``weights``. With ``new_head`` the classifier starts with
    random weights if the file has another number of classes than ``num_classes``.
    """

    panel = MODEL

    name: str
    weights: Annotated[
        str | None,
        Option(
            "Local float weights: .safetensors, .pth, .pt or .th; loaded without running code",
            "FILE",
            file=True,
        ),
    ] = None
    weights_key: Annotated[
        str | None,
        Option(
            "Key of the tensors to load, if `model.weights` holds several sets: state_dict_ema, callbacks.ema",
            "KEY",
            "averaged weights if present, as in timm",
        ),
    ] = None
    pretrained: Annotated[bool, Option("Load the published weights; without, start from random ones")] = True
    num_classes: Annotated[Positive | None, Option("Number of classes", "N", "that of the weights")] = None
    new_head: Annotated[
        bool,
        Option(
            "Start with a random classifier if `model.weights` has a different number of classes than "
            "`model.num_classes`",
            negative=False,
        ),
    ] = False
    in_chans: Annotated[Positive | None, Option("Number of image channels", "N", "3")] = None
    kwargs: Annotated[
        dict[str, Any],
        Option(
            "Arguments of the model's builder, such as `pad_type=same,bn_eps=0.001`",
            "K=V,...",
            names=("model-kwargs",),
            parse="assignments",
        ),
    ] = {}
    input_size: Annotated[
        Positive | tuple[int, ...] | None,
        Option(
            "Image size in pixels: `224`, or `256x192` (height x width)",
            "SIDE|HxW",
            "as the network expects",
            panel=DATA,
            parse="size",
        ),
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        Option(
            "Mean of each channel, for pixels scaled to 0..1",
            "R,G,B",
            "as the network expects",
            panel=DATA,
            parse="numbers",
        ),
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        Option(
            "Standard deviation of each channel, for pixels scaled to 0..1",
            "R,G,B",
            "as the network expects",
            panel=DATA,
            parse="numbers",
        ),
    ] = None


class DataSection(_Section):
    """The images, their classes, and their loading.

    ``class_order`` is ``timm``, ``torchvision`` or a file of class names; None takes the order of the checkpoint, of a
    file in the data folder, or of the network's library. ``class_map`` is a file from folders to classes.
    ``exif_transpose`` None is the setting of the quantized model, false for a float model. ``augmentation`` "auto" is
    ``cifar`` (pad 4, crop, flip) up to 64 pixels and ``imagenet`` (random resized crop, flip) above. ``workers`` and
    ``eval_batch_size`` None depend on the image size. ``cache`` does not change results.
    """

    panel = DATA

    path: Annotated[
        str | None,
        Option(
            "Folder of `train/` and `val/` with a folder per class; the same as a tar or zip, as a CSV of files and "
            "classes, as parquet or arrow, or CIFAR's pickles; or timm's `torch/cifar100`, `hfds/NAME`, `wds/DIR`",
            "DIR",
            names=("data",),
        ),
    ] = None
    calibration: Annotated[
        str | None,
        Option(
            "Images without labels to calibrate on: a folder of any depth, a tar, or a list file with one path a line. "
            "With it, `data.path` is needed only to train and to measure accuracy",
            "PATH",
            "training images",
        ),
    ] = None
    split: Annotated[
        str | None,
        Option(
            "Split that accuracy is measured on, by its name in the data",
            "NAME",
            "the first of val, validation and test",
        ),
    ] = None
    batch_size: Annotated[Positive, Option("Images per training step", "N")] = 128
    eval_batch_size: Annotated[
        Positive | None,
        Option("Images per batch", "N", "256 up to 64 pixels, else 64", names=("batch-size",)),
    ] = None
    workers: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Option("Processes that read images", "N", "none up to 64 pixels, else one per core, at most 8"),
    ] = None
    cache: Annotated[
        Literal["auto", "memory", "disk", "off"],
        Option(
            "Where images are kept once read: in memory if they fill at most a quarter of the free memory (auto) or "
            "three quarters (memory), in a file in the run directory (disk), nowhere (off); results are the same"
        ),
    ] = "auto"
    augmentation: Literal["auto", "imagenet", "cifar", "none"] = "auto"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    calibration_images: Positive = 512
    verify_images: Annotated[
        CountOrAll,
        Option(
            "Validation images to verify exported files on, drawn evenly over the classes",
            "N|all",
            parse="count or all",
        ),
    ] = 500
    bad_images: Annotated[
        Literal["refuse", "skip"], Option("What to do with an image that cannot be read")
    ] = "refuse"
    class_order: Annotated[
        str | None,
        Option(
            "How class folders are numbered: timm (2 before 10), torchvision (as text) or a file of names",
            "timm|torchvision|FILE",
            "that of the run, checkpoint or class_to_idx file beside the folders, else of the model's library",
        ),
    ] = None
    class_map: Annotated[
        str | None,
        Option(
            "Class of each folder: lines FOLDER CLASS, CSV or JSON; a class is a name, a synset or an index",
            "FILE",
        ),
    ] = None
    exif_transpose: Annotated[
        bool | None,
        Option(
            "Rotate images by their EXIF orientation",
            default="as the run did, else `data.exif_transpose=False`, as timm and torchvision do",
        ),
    ] = None

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """JSON has the images for calibration and the split only if they are set."""
        unused = {name for name in ("calibration", "split") if getattr(self, name) is None}
        return {key: value for key, value in handler(self).items() if key not in unused}


class QuantizationSection(_Section):
    """The quantizers, and the source of the bits: ``bits``, a budget (``bops``, ``size`` in bytes), or ``policy``.

    A budget may also be one of accuracy (``max_drop`` or ``min_top1``), alone or with the others. ``target`` is a name
    in the table of targets (``saqcli.target``), or a file. ``contents`` holds what the files said that ``target`` and
    ``cost`` name, by these two names, when the settings were made; no file is read again.

    ``candidates`` are the widths of weights, and of inputs too unless ``activation_candidates`` lists others. Both are
    chosen apart, unless these are ``tied`` (null in settings of older versions): one width for both. ``pins`` restrict
    them by pattern of layer names: ``4``, ``3-6``, ``w4a8``; the last match decides.
    ``restore_deviation`` multiplies normalized weights by the deviation of the float ones again; false as in the paper.
    ``correct_bias`` and ``recalibrate_bn`` compensate the mean shift by quantization after calibration.
    """

    panel = BITS

    target: Annotated[
        str,
        Option(
            "Where the network will run, which decides what is quantized besides layers, which bits are allowed, and "
            "how files are written: {choices}, or a file NAME.toml",
            "NAME|FILE",
            choices=_names("paper ort-cpu openvino tensorrt qonnx int8-generic armv8-xnnpack"),
            family="targets",
        ),
    ] = "paper"
    bits: Annotated[
        Text | None,
        Option(
            "Uniform bits: `4`, or `w4a8` for weights and inputs; the first and the last layer keep 8", "BITS"
        ),
    ] = None
    bops: Annotated[
        Text | None,
        Option(
            "Budget of bit-operations for one image: `34G`, `5e8`, `w4a4` for the cost of 4 bits everywhere, or `50%` "
            "of that of 8 bits everywhere; with `quantization.cost` in its unit: `1.8ms`",
            "BUDGET",
            names=("bops", "budget"),
        ),
    ] = None
    size: Annotated[
        Text | None,
        Option(
            "Budget of bytes: `5MB`, `4MiB`, `w4a4` for that of 4 bits everywhere, or `50%` of that of 8 bits; alone "
            "or together with `quantization.bops`",
            "BUDGET",
        ),
    ] = None
    max_drop: Annotated[
        Annotated[float, Field(ge=0, lt=100)] | None,
        Option(
            "Budget of accuracy: the most points of top-1 that may be lost; alone for the fewest bit-operations, or "
            "together with `quantization.bops` or `quantization.size`",
            "POINTS",
            least=0,
        ),
    ] = None
    min_top1: Annotated[
        Annotated[float, Field(gt=0, le=100)] | None,
        Option("The same as the least top-1 in percent", "PERCENT", names=("min-top1",), least=0),
    ] = None
    cost: Annotated[
        str,
        Option(
            "Cost model whose unit `quantization.bops` counts: {choices}, or a JSON file of each layer's costs",
            "NAME|FILE",
            choices=_names("bops"),
            family="costs",
        ),
    ] = "bops"
    policy: Annotated[
        str | None,
        Option("Bits of every layer: a policy.json, or a run that holds one", "FILE|RUN", file=True),
    ] = None
    searcher: Annotated[
        str,
        Option(
            "Method that finds the bits under a budget: {choices}",
            "NAME",
            choices=_names("samq asga hawq sensitivity fisher swaps random error uniform"),
            family="searchers",
        ),
    ] = "swaps"
    candidates: Annotated[Widths, Option("Bit-widths that a layer may have", "2,3,4", parse="widths")] = (
        WIDTHS
    )
    activation_candidates: Annotated[
        Widths | Literal["same", "tied"],
        BeforeValidator(lambda given: "tied" if given is None else given),
        Option(
            "Bit-widths that the inputs of a layer may have: a list, `same` for those that its weights may have, "
            "chosen independently, or `tied` for the bits of its weights",
            "4,8",
            parse="input widths",
        ),
    ] = "same"
    pins: Annotated[
        dict[str, Text],
        Option(
            "Bits of the layers that match a pattern: `'layer4.*=8'`, `'*.conv1=3-6'`, `'fc=w8a4'`",
            "PATTERN=BITS",
            names=("pin",),
            parse="pins",
            repeated=True,
        ),
    ] = {}
    quantizer: Annotated[
        str,
        Option(
            "Quantizers of weights and inputs: {choices}",
            "NAME",
            choices=_QUANTIZERS,
            family="quantizers",
        ),
    ] = "clip"
    weight_quantizer: Annotated[
        str | None,
        Option(
            "Quantizer of the weights alone: {choices}",
            "NAME",
            "that of `quantization.quantizer`",
            choices=_QUANTIZERS,
            family="quantizers",
        ),
    ] = None
    activation_quantizer: Annotated[
        str | None,
        Option(
            "Quantizer of the layers' inputs alone: {choices}",
            "NAME",
            "that of `quantization.quantizer`",
            choices=_QUANTIZERS,
            family="quantizers",
        ),
    ] = None
    weight_grid: Annotated[
        Literal["auto", "paper", "zero"],
        Option(
            "Levels of the weights: paper (none at zero), zero (one at zero), or auto: paper up to 7 bits, INT8 at 8"
        ),
    ] = "auto"
    granularity: Annotated[
        Literal["channel", "tensor"],
        Option("Scope of a weight's levels: each output channel, or the whole tensor"),
    ] = "channel"
    weight_normalization: Annotated[
        bool,
        Option(
            "Standardize the weights of convolutions before quantization; quantizer clip only",
            names=("weight-norm",),
        ),
    ] = False
    restore_deviation: bool = True
    clip_init: Literal["error", "output", "paper"] = "error"
    error_power: Annotated[float, Field(ge=1, le=4)] = 2.0
    short_steps: Annotated[
        Annotated[int, Field(ge=1, le=8)] | None,
        Option(
            "Most significant bits of every step, 1 to 8: sums become exact in float32, and files of style qdq equal "
            "PyTorch to the last bit; folds batch norms into weights",
            "BITS",
            least=1,
        ),
    ] = None
    quantize_attention: Annotated[
        bool,
        Option("Also quantize and count the products of attention (queries, keys, probabilities, values)"),
    ] = False
    compensate: Annotated[
        bool,
        Option(
            "After calibration, correct a scale and an offset per channel by least squares against the float network; "
            "takes seconds and no labels",
            panel=RECONSTRUCTION,
        ),
    ] = False
    balance_norms: Annotated[
        bool, Option("Give the channels of layer norms similar ranges by ratios that the next layers undo")
    ] = False
    correct_bias: Annotated[
        bool, Option("Bias correction: restore each layer's float output mean after calibration")
    ] = False
    recalibrate_bn: Annotated[
        bool, Option("Adapt batch-norm statistics to the quantized layers after calibration")
    ] = True
    contents: dict[Literal["target", "cost"], dict[str, Any]] = {}

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """JSON has the settings below only if they are set, or if the recorded target has another default."""
        defaults: dict[str, Any] = {
            "target": "paper",
            "cost": "bops",
            "max_drop": None,
            "min_top1": None,
            "weight_quantizer": None,
            "activation_quantizer": None,
            "restore_deviation": True,
            "error_power": 2.0,
            "short_steps": None,
            "balance_norms": False,
            "compensate": False,
            "contents": {},
        }
        of_target = self.contents.get("target", {}).get("settings", {}).get("quantization", {})
        unused = {name for name, default in defaults.items() if getattr(self, name) == default} - {*of_target}
        return {key: value for key, value in handler(self).items() if key not in unused}


class ProxySection(_Section):
    """A small proxy data set for the search, and the network built for it.

    None takes the value of the target network; ``data`` None is the path of the data section, ``num_classes`` None the
    number of class folders. The network is first trained in floating point for ``epochs``; None is one epoch if the
    classifier is new.
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
    """The images of a search, its comparisons, and its training.

    ``images`` of ``classes`` classes are drawn from the training split by seed, None for all. The share ``held_out`` is
    not trained on; ``scoring_images`` of it compare configurations, with the share ``weight_error`` of the error of
    weights (None: as suits what follows the search). ``epochs`` and ``rho`` None are the searcher's own;
    ``options`` hold further keyword arguments by searcher. ``pareto`` is the number of budgets of a front.
    ``trials`` is the most fine-tunings that an accuracy budget of ``saq quantize`` is tried with.
    """

    panel = SEARCH

    epochs: Annotated[
        Rate | None, Option("Epochs of a search that trains (samq, asga)", "N", "the searcher's own")
    ] = None
    rho: Annotated[
        NotNegative | None, Option("Radius of the perturbation in samq", "RADIUS", "the searcher's own")
    ] = None
    images: Annotated[
        Positive | None,
        Option("Training images to search on, drawn by seed", "N", "all", names=("search-images",), least=2),
    ] = None
    classes: Annotated[
        Positive | None, Option("Classes to search on, drawn by seed", "N", "all", names=("search-classes",))
    ] = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.5
    scoring_images: Annotated[Positive, Option("Most held-out images that score configurations", "N")] = 2048
    weight_error: Annotated[
        float | None,
        Field(ge=0, le=1),
        Option(
            "Share of the quantization error of weights that configurations are compared with: training and "
            "reconstruction repair the rest",
            "SHARE",
            "0.5 for a policy that will be trained or reconstructed, 1 where calibrated accuracy is asked for",
        ),
    ] = None
    optimizer: str = "sgd"
    lr: Annotated[Rate, Option("Learning rate of the weights during the search", "RATE")] = 0.01
    weight_decay: NotNegative = 1e-4
    pareto: Annotated[
        int,
        Field(ge=0),
        Option("Also search at N budgets, for a table and a picture of accuracy over cost", "N"),
    ] = 0
    trials: Annotated[int, Field(ge=0, le=10)] = 3
    proxy: Annotated[
        ProxySection | None,
        Option(
            "Search on a smaller data set, with a network built for it: `num_classes=10,input_size=32,weights=FILE`",
            "K=V,...",
            parse="assignments",
        ),
    ] = None
    options: dict[str, dict[str, Any]] = {}


class ReconstructionSection(_Section):
    """Reconstruction: blocks of the network are fitted to those of the float network, without labels.

    The other settings are those of ``saqcli.reconstruction.options.Reconstruction``, which explains them.
    """

    panel = RECONSTRUCTION

    enabled: Annotated[
        bool,
        Option(
            "Before fine-tuning, fit every block of the network to its float block on the calibration images; takes "
            "minutes and no labels",
            names=("reconstruct",),
        ),
    ] = False
    iterations: Annotated[
        int,
        Field(ge=0),
        Option("Iterations of `reconstruction.enabled` on each block; 0 changes nothing", "N"),
    ] = 150
    batch_size: Positive = 48
    most_values: Positive = 4_000_000
    drop: Annotated[float, Field(ge=0, le=1)] = 0.5
    drop_inputs: Annotated[float, Field(ge=0, le=1)] = 0.0
    rounding: Literal["straight", "soft"] = "straight"
    weight_lr: NotNegative = 0.015
    rounding_lr: NotNegative = 0.05
    weight_level_lr: NotNegative = 0.004
    input_level_lr: NotNegative = 0.003
    bias_lr: NotNegative = 0.0
    regularization: NotNegative = 0.1
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.2
    weighting: Literal["none", "fisher"] = "none"
    noise_radius: NotNegative = 0.0
    form: Literal["gradient", "descent"] = "gradient"


class TrainingSection(_Section):
    """Fine-tuning of the quantized network.

    ``clip_lr_factor`` scales the learning rate of clipping levels, which have weight decay only with ``decay_clips``.
    ``sharpness_batch`` images share one perturbation. ``rho`` None is the paper's radius for the mean bit-width.
    ``minimizer`` holds further keyword arguments of the method.

    ``perturb`` says what ascends: all that the method perturbs, or a part of it.

    Cheaper ascents: from the share ``sharpness_from`` of all steps on; only at every ``sam_interval``-th step, adding
    ``sam_reuse`` times the last ascent in between; on the share ``ascent_fraction`` of the images; in bfloat16.

    ``micro_batch`` images are in one forward pass, None for all that share a perturbation. Up to ``skip_steps``
    successive steps are skipped if the loss is NaN or infinite, then training stops. ``clip_grad`` is the largest joint
    norm of the gradients. ``ema_decay`` 0 averages no weights. ``mixup`` and ``cutmix`` are the alphas of their beta
    distributions, 0 for none. ``dampening`` lets codes that oscillate settle (see ``training.dampening``).

    ``distill`` None learns from the float model in QAT, where all of its weights are trained.

    ``compile``, ``memory_format`` and ``precision`` say how passes are computed (see ``training.execution``). Where
    they are ``auto``, steps are timed at the start of runs of minutes.

    ``keep`` chooses the exported state: that of the ``last`` epoch, or the ``best`` one on the validation images, with
    the calibrated state as the first candidate.
    """

    panel = TRAINING

    method: Annotated[
        str,
        Option(
            "Training method: {choices}",
            "NAME",
            choices={
                "saq": "",
                "asaq": "adaptive radius",
                "sam": "",
                "case1": "",
                "msam": "along the momentum",
                "qat": "no perturbation",
            },
            family="minimizers",
        ),
    ] = "saq"
    epochs: Annotated[int, Field(ge=0), Option("Epochs of fine-tuning; 0 calibrates only", "N")] = 3
    optimizer: Annotated[str, Option("Optimizer by its name in timm: sgd (Nesterov), adamw, ...", "NAME")] = (
        "sgd"
    )
    lr: Annotated[Rate, Option("Learning rate", "RATE")] = 0.005
    momentum: NotNegative = 0.9
    weight_decay: NotNegative = 1e-4
    clip_lr_factor: NotNegative = 1.0
    decay_clips: bool = False
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup_epochs: NotNegative = 0
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=1),
        Option("Label smoothing, 0 to below 1", "SHARE", panel=REGULARIZATION),
    ] = 0.0
    rho: Annotated[
        NotNegative | None,
        Option("Radius of the perturbation", "RADIUS", "the paper's for network, bits and image size"),
    ] = None
    rho_unit: Annotated[
        Literal["deviation", "absolute"],
        Option("Unit of `training.rho`: standard deviations of each layer's weights, or none"),
    ] = "deviation"
    perturb: Annotated[
        Literal["all", "weights", "norms", "layers"],
        Option(
            "What ascends, of all that the method perturbs: weights, norms, or layers (their weights and biases)"
        ),
    ] = "all"
    sharpness_from: Annotated[
        float,
        Field(ge=0, lt=1),
        Option("Plain steps up to this share of the training, 0 to below 1", "SHARE", panel=EFFICIENCY),
    ] = 0.0
    sharpness_batch: Annotated[Positive, Option("Images that share one perturbation", "N")] = 128
    sam_interval: Annotated[
        Positive, Option("Perturb at every N-th step, with plain steps in between", "N", panel=EFFICIENCY)
    ] = 1
    sam_reuse: Annotated[
        NotNegative,
        Option(
            "Share of the last perturbation's effect that plain steps reuse",
            "SHARE",
            panel=EFFICIENCY,
            least=0,
        ),
    ] = 0.0
    ascent_fraction: Annotated[
        float,
        Field(gt=0, le=1),
        Option("Share of the images that find the perturbation, above 0 up to 1", "SHARE", panel=EFFICIENCY),
    ] = 1.0
    ascent_precision: Literal["same", "bfloat16"] = "same"
    micro_batch: Annotated[
        Positive | None,
        Option(
            "Most images in one forward pass; gradients accumulate",
            "N",
            "all that share a perturbation",
            panel=EFFICIENCY,
        ),
    ] = None
    skip_steps: Annotated[int, Field(ge=0)] = 10
    clip_grad: Annotated[
        Rate | None, Option("Largest joint norm of all gradients", "NORM", "no limit", panel=REGULARIZATION)
    ] = None
    ema_decay: Annotated[
        float,
        Field(ge=0, lt=1),
        Option(
            "Decay of the moving average of the weights, 0 to below 1; the average is evaluated and kept",
            "DECAY",
            panel=REGULARIZATION,
            names=("ema",),
        ),
    ] = 0.0
    mixup: Annotated[
        NotNegative, Option("Alpha of mixup, 0 for none", "ALPHA", panel=REGULARIZATION, least=0)
    ] = 0.0
    cutmix: Annotated[
        NotNegative, Option("Alpha of cutmix, 0 for none", "ALPHA", panel=REGULARIZATION, least=0)
    ] = 0.0
    distill: Annotated[
        bool | None,
        Option(
            "Also learn from the outputs of the float model",
            default="with `training.method=qat`, where all of its weights are trained",
            panel=REGULARIZATION,
        ),
    ] = None
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    distill_temperature: Rate = 4.0
    precision: Annotated[
        Literal["float32", "bfloat16", "auto"],
        Option(
            "Precision of the forward pass; `auto` is the faster, and float32 below 3 bits",
            panel=EFFICIENCY,
        ),
    ] = "float32"
    compile: Annotated[
        Literal["auto", "on", "kernels", "off"],
        Option(
            "Compile the training step, or only the kernels of quantizers; `auto` where the steps ahead repay it",
            panel=EFFICIENCY,
        ),
    ] = "auto"
    memory_format: Annotated[
        Literal["auto", "contiguous", "channels_last"],
        Option("Order of images and convolution weights in memory; `auto` is the faster", panel=EFFICIENCY),
    ] = "auto"
    dampening: Annotated[
        NotNegative,
        Option(
            "Weight of the pull of weights to the levels they are rounded to, 0 for none; rises from 0",
            "WEIGHT",
            panel=REGULARIZATION,
            least=0,
        ),
    ] = 0.0
    keep: Literal["last", "best"] = "last"
    minimizer: dict[str, Any] = {}


class RunSection(_Section):
    """Seed, device, deterministic kernels, trackers, and the interval of checkpoints.

    ``track`` are names in the table of trackers; a run that is resumed may change them.
    """

    panel = RUN

    seed: Annotated[int, Field(ge=0, lt=2**63), Option("Random seed", "N")] = 0
    device: Annotated[
        str,
        Option(
            "Device to compute on: cpu, cuda or cuda:1",
            "DEVICE",
            "the GPU if there is one, else the CPU",
            panel=GENERAL,
        ),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Option(
            "Use deterministic kernels only: runs on a GPU repeat exactly; slower, and an error where one is missing",
            negative=False,
        ),
    ] = False
    track: Annotated[
        tuple[str, ...],
        Option(
            "Also record the run with a tracker: {choices}",
            "TOOL",
            choices=_names("tensorboard trackio wandb mlflow"),
            family="trackers",
            repeated=True,
        ),
    ] = ()
    checkpoint_minutes: Rate = 10.0

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """JSON has trackers only if there are some."""
        return {key: value for key, value in handler(self).items() if key != "track" or value}


class ExportSection(_Section):
    """The ONNX files that ``saq quantize`` ends with, one a style, the first as ``model.onnx``; () for none."""

    panel = EXPORT

    styles: Annotated[
        tuple[str, ...],
        Option(
            "Styles of the ONNX files, one file each: {choices}",
            "STYLE",
            choices={
                "qdq": "read by most runtimes",
                "qdq-vnni": "with INT8 weights: faster, wrong on x86 without VNNI",
                "exact": "equal to PyTorch bit for bit",
                "trt": "INT8 without zero points",
                "qonnx": "IntQuant nodes",
                "ort": "integers from input to logits in ONNX Runtime",
                "ort-vnni": "as ort with INT8 weights: faster, wrong on x86 without VNNI",
            },
            family="styles",
            names=("style",),
            repeated=True,
        ),
    ] = ("qdq",)


class RunConfig(_Section):
    """All settings. This is ``config.json``."""

    panel = RUN

    schema_version: Literal[1] = 1
    recipe: Annotated[
        str, Option("Settings to start from: {choices}", "NAME", choices=_names(" ".join(recipes())))
    ] = DEFAULT_RECIPE
    model: ModelSection
    data: DataSection = Field(default_factory=DataSection)
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)
    search: SearchSection = Field(default_factory=SearchSection)
    reconstruction: ReconstructionSection = Field(default_factory=ReconstructionSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    export: ExportSection = Field(default_factory=ExportSection)
    run: RunSection = Field(default_factory=RunSection)

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """JSON has the section of reconstruction only if it is used."""
        used = self.reconstruction != ReconstructionSection()
        return {key: value for key, value in handler(self).items() if key != "reconstruction" or used}

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return self.model_dump_json(indent=2) + "\n"


def resolve(
    *,
    recipe: str | None = None,
    file: Path | None = None,
    assignments: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration that defaults, recipe, file, assignments and options make together.

    Settings of the target come between those of the recipe and of the file. The method is ``saq`` if settings of its
    perturbation are given and no method is.

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


_LIBRARIES = ("timm", "torchvision", "saq")  # ``timm:resnet18`` is a spelling of timm/resnet18
_OWN = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def names_own_network(name: str) -> bool:
    """Whether ``name`` is ``MODULE:NAME``, a network of the user's own; nothing is imported.

    Example:
        >>> [names_own_network(name) for name in ("mypackage.nets:build", "timm:resnet18", "nets.py:build", "resnet18")]
        [True, False, False, False]
    """
    module = name.partition(":")[0]
    return (
        bool(_OWN.fullmatch(name))
        and module.split(".")[0].lower() not in _LIBRARIES
        and not module.endswith(".py")
    )


def _check_named(given: Mapping[str, Any], file: Path) -> None:
    """Check that ``file`` alone does not name a network of the user's own.

    Raises:
        BuilderError: it does; importing it would run code because a file says so.
    """
    model = given.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and names_own_network(name):
        name = printable(name, 200)
        raise BuilderError(
            f"{file} names the network {name} of a module outside saq, and names in files are never imported: "
            f"if you know and trust this module, give it as `model.name` too: {name}"
        )


def resolve_into(
    problems: Problems,
    *,
    recipe: str | None,
    file: Path | None,
    assignments: Mapping[str, str] | None,
    options: Mapping[str, Any] | None,
    images: str | None = None,
) -> RunConfig | None:
    """As ``resolve``, with what is wrong added to ``problems``; made of the rest, None where there is none.

    A model that was not named has an empty name. ``images`` are the ``data.path`` where nothing else says it.
    """
    given, where = (problems.attempt(_read, file), f" in {file}") if file else ({}, "")
    if given is None:  # nothing can be said of the rest
        return None
    name = recipe or str(given.get("recipe") or DEFAULT_RECIPE)
    tree: dict[str, Any] = {"data": {"path": images}} if images else {}
    base = problems.attempt(read_recipe, name, "" if recipe else where)
    name = name if base is not None else DEFAULT_RECIPE
    _merge(tree, read_recipe(name) if base is None else base)
    sources = [given, assignments or {}, options or {}]
    contents = _contents(problems, "target", *sources)
    defaults = problems.attempt(_defaults_of_target, contents, *sources) or {}
    contents |= _contents(problems, "cost", defaults, *sources)
    _merge(tree, defaults)
    _merge(tree, given)
    tree["recipe"] = name
    for key, text in (assignments or {}).items():
        problems.attempt(_assign, tree, key, _value(text))
    for key, value in (options or {}).items():
        if value is not None:
            problems.attempt(_assign, tree, key, value)
    if isinstance(section := tree.setdefault("quantization", {}), dict):
        section["contents"] = contents
    if images and not _names_path(sources):
        _calibrate_alone(tree)
    if not (recipe or given.get("recipe")):
        _train_on_labels_only(tree, sources)
    _ascend_if_asked(tree, sources)
    model = tree.setdefault("model", {})
    if file and (options or {}).get("model.name") is None and "model.name" not in (assignments or {}):
        before = len(problems.errors)
        problems.attempt(_check_named, given, file)
        if len(problems.errors) > before:
            model["name"] = ""
    if not isinstance(model, dict) or "name" not in model:
        problems.add(
            ConfigError(
                f"no model was named{where}: give `model.name`, such as timm/resnet18, or a `config` with one"
            )
        )
        tree["model"] = {**(model if isinstance(model, dict) else {}), "name": ""}
    return _checked(problems, tree, str(file) if file else "configuration")


def names_table(cost: str) -> bool:
    """Whether ``quantization.cost`` is the path of a table of costs, and no name of a cost model."""
    return cost.endswith(".json") or "/" in cost


def _named(setting: str, *given: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The text of ``quantization.SETTING`` in file, assignments or options, the last wins, and its recorded content."""
    name, recorded = None, None
    for one in given:
        section = one.get("quantization")
        inside = section if isinstance(section, Mapping) else {}
        named = inside.get(setting, one.get(f"quantization.{setting}"))
        if named is not None:
            contents = inside.get("contents")
            name, recorded = named, contents.get(setting) if isinstance(contents, Mapping) else None
    return (name, recorded) if isinstance(name, str) else (None, None)


def _contents(
    problems: Problems, setting: Literal["target", "cost"], *given: Mapping[str, Any]
) -> dict[str, Any]:
    """What the file that ``setting`` names says, if it names one; not read where a configuration file holds it.

    What is wrong is added to ``problems``.
    """
    from saqcli.target import is_file, target_content

    of_file, read = (is_file, target_content) if setting == "target" else (names_table, _table_content)
    name, recorded = _named(setting, *given)
    if name is None or not of_file(name):
        return {}
    content = problems.attempt(read, name) if recorded is None else recorded
    return {} if content is None else {setting: content}


def _table_content(name: str) -> dict[str, Any]:
    """The content of a table of costs, not yet checked.

    Raises:
        ConfigError: the file cannot be read, or holds no object.
    """
    text = read_text(named_path(name), f"`quantization.cost={name}`", most=_MOST_TABLE)
    tree = read_json(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} cannot be read as a table of costs: it holds no object")
    return tree


def _defaults_of_target(contents: Mapping[str, Any], *given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the target that file, assignments or options name, its first style among them; later ones win.

    Raises:
        ConfigError: there is no such target.
    """
    from saqcli.target import is_file, target_of

    name, _ = _named("target", *given)
    if name is None:
        return {}
    content = contents.get("target")
    if is_file(name) and not isinstance(content, dict):  # which is reported elsewhere
        return {}
    target = target_of(
        QuantizationSection(target=name, contents={} if content is None else {"target": content})
    )
    chosen: dict[str, Any] = {"export": {"styles": target.styles[:1]}} if target.styles else {}
    _merge(chosen, target.settings)
    return chosen


def _calibrate_alone(tree: dict[str, Any]) -> None:
    """Drop the default images where others are given for calibration: nobody asked to measure or train on them."""
    data = tree.get("data")
    if isinstance(data, dict) and data.get("calibration") is not None:
        data.pop("path", None)


def _names_path(given: Sequence[Mapping[str, Any]]) -> bool:
    """Whether file, assignments or options give ``data.path``."""
    return any(settings.get("path") is not None for settings in _settings_of("data", given))


def _train_on_labels_only(tree: dict[str, Any], given: Sequence[Mapping[str, Any]]) -> None:
    """Set ``training.epochs`` to 0 where images for calibration are the only ones, unless the user gives epochs."""
    data, training = tree.get("data"), tree.get("training")
    if not isinstance(data, dict) or not isinstance(training, dict):
        return
    if data.get("calibration") is None or data.get("path") is not None:
        return
    if not _gives(given, "epochs"):
        training["epochs"] = 0


# Settings of the pass that perturbs; whoever gives one wants a method that has it.
_OF_ASCENTS = (
    *("rho", "rho_unit", "perturb", "minimizer", "sharpness_from"),
    *("sam_interval", "sam_reuse", "ascent_fraction", "ascent_precision"),
)


def _ascend_if_asked(tree: dict[str, Any], given: Sequence[Mapping[str, Any]]) -> None:
    """Set ``training.method`` from ``qat`` to ``saq`` where the user sets how it perturbs and names no method.

    A method in a file names none for the assignments and options beside it: files of runs name one in any case.

    Args:
        tree: the settings so far.
        given: file, assignments and options.
    """
    file, *later = given
    training = tree.get("training")
    if not isinstance(training, dict) or training.get("method") != "qat" or _gives(later, "method"):
        return
    if _gives(later, *_OF_ASCENTS) or (_gives([file], *_OF_ASCENTS) and not _gives([file], "method")):
        training["method"] = "saq"


def _gives(given: Sequence[Mapping[str, Any]], *names: str) -> bool:
    """Whether one of these settings of training is given, with another value than its default if it has a default.

    ``method`` counts with any value.
    """
    fields = TrainingSection.model_fields
    return any(
        name in found and (name in ("method", "epochs") or found[name] != fields[name].default)
        for found in _settings_of("training", given)
        for name in names
    )


def _settings_of(section: str, given: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The settings of a section that file, assignments and options give, each by name."""
    for one in given:
        inside = one.get(section)
        found = dict(inside) if isinstance(inside, Mapping) else {}
        for key, value in one.items():
            name, _, inner = key.removeprefix(f"{section}.").partition(".")
            if key.startswith(f"{section}.") and value is not None:
                found[name] = {inner: value} if inner else _value(value) if isinstance(value, str) else value
        yield found


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


def read_recipe(name: str, where: str = "") -> dict[str, Any]:
    """The settings of a recipe; ``where`` says in a message who named it.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in recipes():
        name = printable(name, 60)
        raise ConfigError(f"there is no recipe {name!r}{where}: choose from {', '.join(recipes())}")
    return tomllib.loads((files("saqcli") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))


def _read(file: Path) -> dict[str, Any]:
    text = read_text(file, str(file), most=2 * _MOST_TABLE)  # which it may hold
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
