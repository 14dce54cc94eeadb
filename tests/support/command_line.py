"""Run commands in this process and read their output."""

import json
from typing import Any

from typer.testing import CliRunner

from saqcli.cli import app


def saq(*arguments: object) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    """Run a command, which must succeed and print only JSON, and return the JSON."""
    result = saq(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def last_error(result: Any) -> str:
    """The error line; under --quiet or --json stderr must hold nothing else."""
    line = last_line(result)
    assert line.startswith("error: ")
    return line


def last_line(result: Any) -> str:
    """The last line on stderr."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines, f"nothing on stderr; stdout: {result.stdout}"
    assert "Traceback" not in result.stderr
    return str(lines[-1])
