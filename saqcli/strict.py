"""Reading what other programs or people wrote: strict, and with one clear line when it does not fit.

Every object that reaches the disk is a pydantic model that forbids unknown keys. Pydantic's own report takes
a screen; a person wants the first thing that is wrong, where it is, and what was expected.
"""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from saqcli.errors import ConfigError, SaqError

Model = TypeVar("Model", bound=BaseModel)


def parse_json(
    schema: type[Model], text: str | bytes, source: str, error: type[SaqError] = ConfigError
) -> Model:
    """``text`` as a ``schema``.

    Args:
        schema: the pydantic model to read.
        text: JSON.
        source: what the message calls the text: a path, an option.
        error: the error raised when it does not fit.

    Raises:
        SaqError: the given ``error``, naming the first misfit and the count of the others.
    """
    try:
        return schema.model_validate_json(text)
    except ValidationError as failure:
        raise error(f"{source}: {describe(failure)}") from None


def parse_object(
    schema: type[Model], value: object, source: str, error: type[SaqError] = ConfigError
) -> Model:
    """``value``, a tree of plain Python objects, as a ``schema``; raises as ``parse_json``."""
    try:
        return schema.model_validate(value)
    except ValidationError as failure:
        raise error(f"{source}: {describe(failure)}") from None


def describe(failure: ValidationError) -> str:
    """The first misfit on one line, and how many more there are."""
    errors = failure.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown key {place!r}"
    elif first["type"] == "missing":
        text = f"key {place!r} is missing"
    else:
        text = f"{place}: {first['msg']}" if place else first["msg"]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return text[0].lower() + text[1:] + more


def printable(text: str, most: int = 600) -> str:
    """``text`` from a stranger's file as one line of printable characters, cut where it is longer than ``most``.

    Example:
        >>> printable("conv1\\nerror: \\x1b[31mall is lost")
        'conv1\\\\nerror: \\\\x1b[31mall is lost'
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."
