"""Local copies of hub repositories; a machine without network learns so within a second."""

import os
import re
import socket
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from urllib.parse import urlparse

from adamerge.errors import EnvironmentProblem, shortlist

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|pkl|npz|h5|gguf|onnx|json|ya?ml|parquet)$")


def is_hub_id(text: str) -> bool:
    """Tell whether a text that is no local path has the form ``owner/name``."""
    return bool(_HUB_ID.fullmatch(text)) and not text.startswith(".") and not _FILE.search(text)


def nowhere(text: str) -> tuple[str, str] | None:
    """Say what lies beside a local path that does not exist, nearest names first.

    Args:
        text: What exists nowhere. It is a hub id only where there is no folder of its owner's name.

    Returns:
        The problem, and a hint that may be empty; None for a hub id.
    """
    path, is_id = Path(text), is_hub_id(text)
    if is_id and not path.parent.is_dir():
        return None
    if text.startswith("~"):
        return f"{text} does not exist: '~' is not expanded here.", "Write the home folder out."
    above = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(above).parts[0]
    _, folders, files = next(os.walk(above), ("", [], []))
    names = sorted(name for name in (*folders, *files) if not name.startswith("."))
    names.sort(key=lambda name: -SequenceMatcher(None, name, wanted).ratio())
    holds = shortlist(names, 8) or "nothing"
    problem = f"{text} does not exist; {'this folder' if above == Path() else above} holds {holds}."
    return problem, f"The hub is asked only where there is no folder {above}." if is_id else ""


def snapshot(repo_id: str, role: str, patterns: Sequence[str], repo_type: str = "model") -> Path:
    """Download (or find in the local cache) those files of a repository that match a pattern.

    Raises:
        EnvironmentProblem: The hub cannot be reached and the repository is not cached.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)
    options = {"repo_type": repo_type, "allow_patterns": list(patterns), "local_files_only": offline}
    try:
        return Path(snapshot_download(repo_id, **options))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "the hub cannot be reached" if offline else type(error).__name__
        raise EnvironmentProblem(
            f"{role}: {repo_id!r} is no local path and was not found on the hub ({reason}).",
            "Download it elsewhere and give the path of the local folder.",
        ) from error


def reachable(endpoint: str, seconds: float = 1.0) -> bool:
    """Try to connect, so that a machine behind a firewall learns within a second."""
    url = urlparse(endpoint)
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # only the proxy knows
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=seconds):
            return True
    except OSError:
        return False
