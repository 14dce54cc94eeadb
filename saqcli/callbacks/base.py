"""What the mixins share."""

from saqcli.errors import ConfigError


def check_first(made: type, mixin: type, method: str) -> None:
    """Check that a class takes ``method`` from the mixin, or from a class derived from it.

    Raises:
        ConfigError: the library's class comes first, so that the mixin would do nothing.
    """
    owner = next(each for each in made.__mro__ if method in vars(each))
    if not issubclass(owner, mixin):
        raise ConfigError(
            f"{made.__name__} takes {method} from {owner.__name__}: name {mixin.__name__} first among its bases"
        )
