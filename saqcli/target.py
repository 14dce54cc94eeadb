"""Targets: what a runtime or a device can run in integers, known before calibration and training.

Which operators are quantized besides weights and inputs of layers, at which widths, and how a file is written is a
property of the place where a network will run. Found out at export it comes too late: the quantizers of an addition
have to be calibrated, and trained, like all others. A target is a small TOML file, of the package
(``saqcli/targets/NAME.toml``), of a user, or the entry point ``saqcli.targets`` of another package. Target ``paper``
adds and forbids nothing: bits, costs and files are those of the publications.

The table ``[settings]`` of a target are defaults that fit it; they lie between the recipe and what the user gives.
What the target cannot run is refused with the layer and the reason.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.plugins import Plugins
from saqcli.serialization import named_path, parse_object, printable, read_text, read_toml
from saqcli.units import counted

PAPER = "paper"
BitWidth = Annotated[int, Field(ge=2, le=8)]
Line = Annotated[str, Field(min_length=1, max_length=400, pattern=r"^[^\n\r]*$")]
Kind = Literal[  # the keys of ``quant.junctions.kinds.KINDS``
    "add",
    "mul",
    "concat",
    "concat_shared",
    "pool",
    "sigmoid",
    "hardsigmoid",
    "silu",
    "hardswish",
    "gelu",
    "tanh",
    "leaky_relu",
]
_MOST_BYTES = 2**16


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Operand(_Part):
    """What a target can do with one operand of its layers.

    Attributes:
        bits: widths that it runs, in any kind of kernel.
        integer: those that it runs in integer kernels, for people.
        float: whether single layers may have it in floating point.
        asymmetric: whether its zero may lie anywhere in the range.
    """

    bits: Annotated[tuple[BitWidth, ...], Field(min_length=1)] = (2, 3, 4, 5, 6, 7, 8)
    integer: tuple[BitWidth, ...] = ()
    float: bool = True
    asymmetric: bool = True


class Weights(Operand):
    """Weights of layers.

    Attributes:
        granularity: scopes of a step, as in ``quantization.granularity``.
        grids: levels, as in ``quantization.weight_grid``.
    """

    granularity: Annotated[tuple[Literal["channel", "tensor"], ...], Field(min_length=1)] = (
        "channel",
        "tensor",
    )
    grids: Annotated[tuple[Literal["auto", "paper", "zero"], ...], Field(min_length=1)] = (
        "auto",
        "paper",
        "zero",
    )


class Inputs(Operand):
    """Inputs of layers, and operands of junctions.

    Attributes:
        tables: whether they may lie on a table of levels instead of a uniform grid.
    """

    tables: bool = True


class Target(_Part):
    """A runtime or a device, as far as quantization has to know it.

    Attributes:
        format: version of this schema.
        name: as in the table of targets.
        description: one line.
        styles: ONNX styles that it reads, the preferred one first; empty for any.
        junctions: kinds of operators besides layers whose operands are quantized.
        junction_bits: width of these operands.
        count_junctions: whether they count as bit-operations.
        short_steps: most significant bits of a step that it takes, of weights and inputs, 1 for powers of two; None
            for any step.
        weights: what it can do with weights.
        inputs: what it can do with inputs.
        bias: container of biases, for people; ``int32`` are multiples of input step times weight step.
        fused: neighbours that run as one operator, for people.
        notes: what else a person should know, for people.
        settings: defaults for this target, by section and key.
    """

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    description: Line
    styles: tuple[str, ...] = ()
    junctions: tuple[Kind, ...] = ()
    junction_bits: BitWidth = 8
    count_junctions: bool = False
    short_steps: Annotated[int, Field(ge=1, le=8)] | None = None
    weights: Weights = Weights()
    inputs: Inputs = Inputs()
    bias: Literal["float", "int32"] = "float"
    fused: tuple[Line, ...] = ()
    notes: tuple[Line, ...] = ()
    settings: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        for section, values in self.settings.items():
            for key in values:
                if (section, key) in (("quantization", "target"), ("model", "name")):
                    raise ValueError(f"settings.{section}.{key} is not for a target to choose")
        return self

    @property
    def adds(self) -> str:
        """What is quantized besides layers, in words; empty if nothing is."""
        if not self.junctions:
            return ""
        counted = "counted" if self.count_junctions else "not counted"
        return f"{', '.join(self.junctions)} at {self.junction_bits} bits, {counted} as bit-operations"

    def candidates(self, widths: tuple[int, ...], operand: Literal["weights", "inputs"]) -> tuple[int, ...]:
        """Those of ``widths`` that the target runs.

        Raises:
            ConfigError: it runs none of them.
        """
        able = getattr(self, operand).bits
        kept = tuple(width for width in widths if width in able)
        if not kept:
            raise ConfigError(
                f"target {self.name} runs {operand} of {_listed(able)} bits, and the candidates are {_listed(widths)}: "
                "choose among the former, or another `quantization.target`"
            )
        return kept

    def check_styles(self, styles: tuple[str, ...]) -> None:
        """Refuse files that the target does not read.

        Raises:
            ConfigError: names the style.
        """
        for style in styles:
            if self.styles and style not in self.styles:
                raise ConfigError(
                    f"target {self.name} reads files of style {_listed(self.styles)}, not {style}: choose one of "
                    "these, or another `quantization.target`"
                )

    def check_scheme(self, scheme: "_Scheme") -> None:
        """Refuse quantizers that the target cannot express.

        Raises:
            ConfigError: names the setting.
        """
        for setting, value, able in (
            ("granularity", scheme.granularity, self.weights.granularity),
            ("weight_grid", scheme.weight_grid, self.weights.grids),
        ):
            if value not in able:
                raise ConfigError(
                    f"target {self.name} has no `quantization.{setting}={value}`: choose {_listed(able)}, or another "
                    "`quantization.target`"
                )
        weights, inputs = scheme.names
        for setting, name, operand in (
            ("weight_quantizer", weights, self.weights),
            ("activation_quantizer", inputs, self.inputs),
        ):
            if name in ("asymmetric", "lsq_plus") and not operand.asymmetric:
                raise ConfigError(
                    f"target {self.name} has symmetric grids only, and `quantization.{setting}={name}` is asymmetric: "
                    "choose another quantizer, or another `quantization.target`"
                )
        if self.short_steps is not None and (
            scheme.short_steps is None or scheme.short_steps > self.short_steps
        ):
            raise ConfigError(
                f"target {self.name} takes steps of at most {counted(self.short_steps, 'significant bit')}: give "
                f"`quantization.short_steps={self.short_steps}`, or choose another `quantization.target`"
            )
        if inputs in ("log2", "adaptive") and not self.inputs.tables:
            raise ConfigError(
                f"target {self.name} has uniform grids only, and `quantization.activation_quantizer={inputs}` has "
                "levels of its own: choose another quantizer, or another `quantization.target`"
            )

    def check_policy(self, layers: Mapping[str, "_LayerBits"]) -> None:
        """Refuse bits that the target cannot run.

        Raises:
            UnsupportedModel: names the layer and the reason.
        """
        for name, bits in layers.items():
            for what, width, operand in (
                ("weights", bits.weight, self.weights),
                ("inputs", bits.activation, self.inputs),
            ):
                if width is None and not operand.float:
                    raise UnsupportedModel(
                        f"target {self.name} runs no layer with {what} in floating point, as {name} has: give it "
                        f"{_listed(operand.bits)} bits, or choose another `quantization.target`"
                    )
                if width is not None and width not in operand.bits:
                    raise UnsupportedModel(
                        f"target {self.name} runs {what} of {_listed(operand.bits)} bits, and {name} has {width}: "
                        "change its bits, or choose another `quantization.target`"
                    )

    def check_quantized(
        self,
        model: str,
        scheme: "_Scheme",
        layers: Mapping[str, "_LayerBits"],
        unquantized: frozenset[str],
    ) -> None:
        """Refuse a quantized model that the target cannot run; arguments and errors as in the three checks of parts."""
        self.check_scheme(scheme)
        self.check_policy(layers)
        self.check_junctions(model, unquantized)

    def check_junctions(self, model: str, unquantized: frozenset[str]) -> None:
        """Refuse a quantized model without the quantizers that the target's integer kernels need.

        Args:
            model: its name.
            unquantized: kinds of its junctions that were not quantized.

        Raises:
            UnsupportedModel: names the kinds.
        """
        missing = [kind for kind in self.junctions if kind in unquantized]
        if missing:
            raise UnsupportedModel(
                f"target {self.name} quantizes the operands of {_listed(tuple(missing))}, and {model} was quantized "
                f"without: quantize it with `quantization.target={self.name}`"
            )


class _LayerBits(Protocol):
    """Bits of a layer; None is floating point."""

    @property
    def weight(self) -> int | None: ...
    @property
    def activation(self) -> int | None: ...


class _Scheme(Protocol):
    """The choice of quantizers."""

    @property
    def granularity(self) -> str: ...
    @property
    def weight_grid(self) -> str: ...
    @property
    def short_steps(self) -> int | None: ...
    @property
    def names(self) -> tuple[str, str]: ...


def _listed(values: tuple[Any, ...]) -> str:
    words = [str(value) for value in values]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def parse_target(text: str, source: str, name: str) -> Target:
    """The target that a TOML text describes.

    Args:
        text: of the file.
        source: of the text, for messages.
        name: of the target; the file does not repeat it.

    Raises:
        ConfigError: not TOML, an unknown key, a value of the wrong kind.
    """
    tree = read_toml(text, source)
    if "name" in tree:
        raise ConfigError(f"{source}: name is that of the file: remove it")
    return parse_object(Target, {**tree, "name": name}, source)


def _ours() -> dict[str, Target]:
    folder = files("saqcli") / "targets"
    texts = {entry.name: entry for entry in folder.iterdir() if entry.name.endswith(".toml")}
    names = sorted((name.removesuffix(".toml") for name in texts), key=lambda name: (name != PAPER, name))
    return {
        name: parse_target(texts[f"{name}.toml"].read_text(encoding="utf-8"), f"target {name}", name)
        for name in names
    }


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no target, or None."""
    return None if isinstance(plugin, Target) else f"it is a {type(plugin).__name__}, not a Target"


TARGETS: Plugins[Target] = Plugins("targets", "target", _ours(), _problem, named=True)


def is_file(text: str) -> bool:
    """Whether ``text`` names a file with a target, not one of the table."""
    return text.endswith(".toml")


def target_content(text: str) -> dict[str, Any]:
    """What the file ``text`` says of a target, for ``target_of``.

    Raises:
        ConfigError: it cannot be read.
    """
    return find_deployment(text).model_dump(mode="json", exclude_unset=True)


def find_deployment(text: str, setting: str = "quantization.target") -> Target:
    """The target ``text``, a name in the table or a file ``NAME.toml``; messages name the ``setting`` that holds it.

    Raises:
        ConfigError: there is none, or its file cannot be read.

    Example:
        >>> find_deployment("ort-cpu").styles[0]
        'ort'
    """
    if not is_file(text):
        return TARGETS.find(text, setting)
    path = named_path(text)
    content = read_text(path, f"`{setting}={printable(text, 200)}`", most=_MOST_BYTES)
    return parse_target(content, str(path), path.stem)


class _Settings(Protocol):
    """The part of the settings that says where the network will run."""

    @property
    def target(self) -> str: ...
    @property
    def contents(self) -> Mapping[Any, Mapping[str, Any]]: ...


def target_of(section: _Settings) -> Target:
    """The target of the settings; one of a file as it was when the settings were made, if they hold its content.

    Raises:
        ConfigError: there is none, or its file cannot be read.
    """
    recorded = section.contents.get("target")
    if recorded is None:
        return find_deployment(section.target)
    return parse_object(Target, {**recorded}, f"the recorded content of {printable(section.target, 200)}")


def deployment_of(target: str | Path | Target | None, junctions: Iterable[str] = ()) -> Target:
    """The target that a public function is given; ``paper`` if it is None.

    Args:
        target: name, file, or the target itself.
        junctions: kinds that are quantized without a target that names some.

    Raises:
        ConfigError: there is no such target, or both name junctions.
    """
    if not isinstance(target, Target):
        target = TARGETS[PAPER] if target is None else find_deployment(str(target), "target")
    kinds = tuple(junctions)
    if kinds and target.junctions:
        raise ConfigError(f"`junctions` are those of target {target.name}: remove `junctions`, or `target`")
    return target.model_copy(update={"junctions": kinds}) if kinds else target
