"""Model folders from the Hugging Face hub; a local path is always the first-class form."""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlparse

from adamerge import zoo
from adamerge.data.tasks import EMBEDDED
from adamerge.errors import EnvironmentProblem, InputError, nearest

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|pkl|npz|h5|gguf|onnx|json|ya?ml)$")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model"]


def is_hub_id(text: str) -> bool:
    """Tell whether a text that is no local path has the form ``owner/name``."""
    return bool(_HUB_ID.fullmatch(text)) and not text.startswith(".") and not _FILE.search(text)


def local_path(source: str | Path, role: str) -> Path:
    """Give a path as it is, or the local copy of a hub repository where no such path exists.

    Raises:
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    path = Path(source)
    return fetch(str(source), role) if not path.exists() and is_hub_id(str(source)) else path


def locate(path: str) -> Path:
    """Give the local path that a user names: a path, a hub id, or ``embedded:NAME``.

    Raises:
        InputError: No such embedded model.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    if not path.startswith(EMBEDDED):
        return local_path(path, path)
    shipped = {"base": zoo.base()} | zoo.experts()
    name = path.removeprefix(EMBEDDED)
    if name not in shipped:
        raise InputError(f"embedded model {name!r} is unknown.", nearest(name, shipped))
    return shipped[name]


def fetch(repo_id: str, role: str) -> Path:
    """Download (or find in the local cache) a model repository's safetensors and configs.

    Raises:
        EnvironmentProblem: The hub cannot be reached and the repository is not cached.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_WANTED, local_files_only=offline))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "the hub cannot be reached" if offline else type(error).__name__
        raise EnvironmentProblem(
            f"{role}: {repo_id!r} is no local path and was not found on the hub ({reason}).",
            "Download it elsewhere and give the path of the local folder.",
        ) from error


def _reachable(endpoint: str, seconds: float = 1.0) -> bool:
    """Try to connect, so that a machine behind a firewall learns within a second."""
    url = urlparse(endpoint)
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # only the proxy knows
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=seconds):
            return True
    except OSError:
        return False
