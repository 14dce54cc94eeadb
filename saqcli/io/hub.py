"""Published weights: whether they can be fetched is found out in seconds, and told in one line.

huggingface_hub tries each file six times with growing pauses (46 s without a network, measured with version
2.4) and torch.hub waits without limit. So what is not in a cache is asked for once, with a time limit, before
either of them starts. Their own settings (``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, proxies) hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from saqcli.errors import SaqError

_SECONDS = 5.0
_REMEDY = "give --weights FILE with a local .safetensors or .pth"
_TRANSPORTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3")


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Turn what a download may raise into a ``SaqError`` that says what to do.

    Raises:
        SaqError: the weights of ``name`` could not be fetched.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _TRANSPORTS:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].strip().rstrip(".:")[:120]
        raise SaqError(
            f"the pretrained weights of {name} could not be fetched ({reason}): {_REMEDY}, or --no-pretrained"
        ) from error


def unpublished(name: str) -> SaqError:
    """The error for a network that nobody published weights of."""
    return SaqError(f"{name} has no published weights: {_REMEDY}, or --no-pretrained for random ones")


def require_repository(repository: str, filename: str | None = None) -> None:
    """Raise within seconds if ``repository`` on the Hugging Face hub is neither cached nor in reach."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    repo_id, _, revision = repository.partition("@")
    names = (filename,) if filename else ("model.safetensors", "pytorch_model.bin")
    cached = (try_to_load_from_cache(repo_id, name, revision=revision or None) for name in names)
    if not any(isinstance(path, str) for path in cached):
        HfApi().model_info(repo_id, revision=revision or None, timeout=_SECONDS)


def require_url(url: str) -> None:
    """Raise within seconds if ``url`` is neither in torch.hub's cache nor in reach."""
    from torch.hub import get_dir

    if not (Path(get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file():
        urlopen(Request(url, method="HEAD"), timeout=_SECONDS).close()
