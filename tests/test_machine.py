"""Free memory is that of the system, within the limits of control groups of both versions."""

from pathlib import Path

import pytest

from saqcli.machine import free_memory

FREE = 8_000 * 1024
V1 = {"limit_in_bytes": 5_000_000, "usage_in_bytes": 3_000_000, "stat": "cache 1\ntotal_inactive_file 500000"}
V2 = {"max": 5_000_000, "current": 3_000_000, "stat": "anon 1\ninactive_file 500000"}


def free(folder: Path, groups: str, where: str, files: dict[str, object]) -> int | None:
    (folder / "self").mkdir()
    (folder / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (folder / "self" / "cgroup").write_text(groups)
    (folder / where).mkdir(parents=True)
    for name, content in files.items():
        (folder / where / f"memory.{name}").write_text(f"{content}\n")
    return free_memory(folder, folder / "groups")


@pytest.mark.parametrize(
    ("groups", "where", "files", "expected"),
    [
        ("0::/a/b\n", "groups/a/b", V2, 2_500_000),
        ("0::/a/b\n", "groups/a", V2, 2_500_000),
        ("0::/on/the/host\n", "groups", V2, 2_500_000),
        ("4:memory:/a/b\n0::/\n", "groups/memory/a/b", V1, 2_500_000),
        ("4:memory:/a/b\n0::/\n", "groups/memory", V1 | {"usage_in_bytes": 6_000_000}, 0),
        ("0::/a\n", "groups/a", V2 | {"max": "max"}, FREE),
        ("0::/a\n", "groups/b", V2, FREE),
    ],
)
def test_free_memory_within_groups(
    groups: str, where: str, files: dict[str, object], expected: int, tmp_path: Path
) -> None:
    assert free(tmp_path, groups, where, files) == expected


def test_free_memory_of_unknown_system(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
