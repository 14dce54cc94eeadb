"""Commands run in this process, and what they answer."""

import json
from typing import Any

from typer.testing import CliRunner

from saqcli.cli import app


def saq(*arguments: object) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    """The JSON that a command prints; it must succeed, and print nothing else."""
    result = saq(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def last_error(result: Any) -> str:
    """The one line that went wrong; nothing else may stand on stderr under --quiet or --json."""
    line = last_line(result)
    assert line.startswith("error: ")
    return line


def last_line(result: Any) -> str:
    """The last line on stderr."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines, f"nothing on stderr; stdout: {result.stdout}"
    assert "Traceback" not in result.stderr
    return str(lines[-1])
