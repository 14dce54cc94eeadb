"""Encodings of text files: UTF-8 with or without a byte order mark; others are named."""

import json
from pathlib import Path

import pytest

from saqcli.config import resolve
from saqcli.errors import ConfigError
from tests.support.command_line import answer, last_error, saq

CONFIG = {
    "config.toml": '[model]\nname = "saq/resnet20"\n[training]\nlr = 0.125\n',
    "config.json": '{"model": {"name": "saq/resnet20"}, "training": {"lr": 0.125}}',
}


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_is_ignored(name: str, newline: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(CONFIG[name].replace("\n", newline).encode("utf-8-sig"))

    assert resolve(file=path).training.lr == 0.125


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.parametrize(
    ("encoding", "called"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")],
)
def test_other_encodings_are_named(name: str, encoding: str, called: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(CONFIG[name].encode(encoding))

    with pytest.raises(ConfigError) as error:
        resolve(file=path)
    assert str(error.value) == f"{path} cannot be read: it is encoded in {called}; save it as UTF-8"


def test_invalid_utf8_byte_is_located(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes('[model]\n# "Größe"\nname = "saq/resnet20"\n'.encode("latin-1"))

    with pytest.raises(ConfigError, match="byte 0xf6 in line 2 is not UTF-8; save it as UTF-8"):
        resolve(file=path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")

    with pytest.raises(ConfigError, match="it is not a text file"):
        resolve(file=path)


def test_policy_may_start_with_bom(tmp_path: Path) -> None:
    layers = {
        layer["name"]: {"weight": 3, "activation": 3} for layer in answer("profile", "saq/resnet20")["layers"]
    }
    text = json.dumps({"schema_version": 1, "model": "saq/resnet20", "layers": layers})
    path = tmp_path / "policy.json"

    path.write_bytes(text.encode("utf-8-sig"))
    marked = answer("profile", "saq/resnet20", "--policy", path)
    assert marked["bops"] == 9 * marked["macs"]

    path.write_bytes(text.encode("utf-16"))
    assert "UTF-16; save it as UTF-8" in last_error(saq("profile", "saq/resnet20", "--policy", path))
