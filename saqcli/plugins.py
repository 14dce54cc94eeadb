"""Tables of plugins: ours, those of other packages' entry points, and those that a program adds.

A family of plugins, such as the quantizers, is a table from names to plugins. A package adds one by an entry point of
the group ``saqcli.FAMILY``:

    [project.entry-points."saqcli.quantizers"]
    apot = "my_package.apot:ENTRY"

and a program by ``TABLE["apot"] = ENTRY``. Entry points are read and loaded at the first use of a table, so that names
can be listed without importing anything. A plugin that cannot be imported, breaks the contract of its family or has the
name of one of ours is left out of the table with one ``PluginWarning``; all others work. One that fails while it works
is named by a ``PluginError`` (``Plugins.blamed``); what ours raise is passed on as it is.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from saqcli.errors import ConfigError, PluginError, PluginWarning, SaqError, out_of_memory

T = TypeVar("T")


@cache
def entry_points_of(family: str) -> tuple[EntryPoint, ...]:
    """The entry points of a family in all installed packages, by name; nothing is imported."""
    return tuple(sorted(entry_points(group=f"saqcli.{family}"), key=lambda point: (point.name, point.value)))


def outside_names(family: str) -> list[str]:
    """Names of the plugins that other packages add to a family; some may turn out to be broken."""
    return list(dict.fromkeys(point.name for point in entry_points_of(family)))


class Plugins(MutableMapping[str, T]):
    """The plugins of a family by name: ours in the order of their table, then others by name.

    Args:
        family: group of the entry points, ``saqcli.FAMILY``.
        word: what a plugin is called in messages.
        own: our plugins.
        check: returns why an object breaks the contract of the family, or None.
        named: whether plugins have an attribute ``name``, which must be their name in the table.

    Example:
        >>> table = Plugins("examples", "example", {"one": 1}, lambda plugin: None)
        >>> table["two"] = 2
        >>> list(table)
        ['one', 'two']
    """

    def __init__(
        self,
        family: str,
        word: str,
        own: Mapping[str, T],
        check: Callable[[Any], str | None],
        *,
        named: bool = False,
    ) -> None:
        self.family, self.word = family, word
        self._own, self._check, self._named = dict(own), check, named
        self._plugins = dict(own)
        self._broken: dict[str, str] = {}
        self._packages: dict[str, str] = {}
        self._loaded = False

    @property
    def broken(self) -> Mapping[str, str]:
        """Plugins of other packages that are disabled, with the reason."""
        self._load()
        return dict(self._broken)

    def find(self, name: str, setting: str | None = None) -> T:
        """The plugin ``name``.

        Args:
            name: as the user typed it.
            setting: that holds the name, for the message.

        Raises:
            ConfigError: there is none, or it is broken; the message lists the others.
        """
        if name in self:
            return self[name]
        of = f"`{setting}={name}`: " if setting else ""
        if name in self._broken:
            raise ConfigError(f"{of}{self._broken[name]}: mend or remove that package, or choose another")
        raise ConfigError(f"{of}there is no {self.word} {name!r}: choose from {', '.join(self)}")

    def is_ours(self, name: str) -> bool:
        """Whether the plugin ``name`` is one of saq's."""
        return name in self._own and self._plugins[name] is self._own[name]

    def failure(self, name: str, reason: str) -> PluginError:
        """The error that the plugin ``name`` failed for ``reason``."""
        package = self._packages.get(name)
        of, remedy = (f" of package {package}", "mend or remove that package") if package else ("", "mend it")
        remedy = "report this" if self.is_ours(name) else remedy
        return PluginError(f"{self.word} {name}{of} failed ({reason}): {remedy}, or choose another")

    @contextmanager
    def blamed(self, name: str) -> Iterator[None]:
        """Within the context the plugin ``name`` works, and is named if it fails and is not one of ours.

        Raises:
            PluginError: in the place of any error that is neither a ``SaqError`` nor for want of memory.
        """
        try:
            yield
        except SaqError:
            raise
        except (Exception, SystemExit) as error:  # code of another package may raise anything
            if self.is_ours(name) or out_of_memory(error):
                raise
            raise self.failure(name, _described(error)) from error

    def __getitem__(self, name: str) -> T:
        if name not in self._plugins:
            self._load()
        return self._plugins[name]

    def __setitem__(self, name: str, plugin: T) -> None:
        reason = _wrong_name(name) or self._problem(name, plugin)
        if reason:
            raise ConfigError(
                f"{self.word} {name!r} does not keep the contract of the {self.family}: {reason}"
            )
        self._plugins[name] = plugin
        self._packages.pop(name, None)

    def __delitem__(self, name: str) -> None:
        self._load()
        del self._plugins[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(list(self._plugins))

    def __len__(self) -> int:
        self._load()
        return len(self._plugins)

    def _problem(self, name: str, plugin: Any) -> str | None:
        """Why ``plugin`` breaks the contract under ``name``, or None."""
        reason = self._check(plugin)
        if reason is None and self._named and plugin.name != name:
            return f"its name is {plugin.name!r}, not {name!r}"
        return reason

    def _load(self) -> None:
        """Load the plugins of other packages, once."""
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points_of(self.family):
            reason = self._add(point)
            if reason:
                package = f" of package {point.dist.name}" if point.dist else ""
                self._broken[point.name] = f"{self.word} {point.name}{package} is disabled, {reason}"
                warnings.warn(self._broken[point.name], PluginWarning, stacklevel=4)

    def _add(self, point: EntryPoint) -> str | None:
        """Add the plugin of an entry point; the reason if it is broken."""
        if reason := _wrong_name(point.name):
            return f"since {reason}"
        if point.name in self._own:
            return "since saq has one of that name"
        if point.name in self._plugins:
            return "since the name is taken already"
        try:
            plugin = point.load()
            reason = self._problem(point.name, plugin)
        except (Exception, SystemExit) as error:  # code of another package may raise anything
            return f"it cannot be loaded ({_described(error)})"
        if reason:
            return f"since it does not keep the contract: {reason}"
        self._plugins[point.name] = plugin
        if point.dist:
            self._packages[point.name] = point.dist.name
        return None


def _wrong_name(name: str) -> str | None:
    """Why ``name`` cannot be part of flags, settings and file names, or None."""
    if re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name):
        return None
    return "its name is not made of letters, digits, - and _"


def _described(error: BaseException) -> str:
    """Type and text of an error, on one line."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
