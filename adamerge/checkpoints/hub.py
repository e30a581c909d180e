"""Model folders from the Hugging Face hub; a local path is always the first-class form."""

from pathlib import Path

from adamerge import zoo
from adamerge.checkpoints.converted import with_safetensors
from adamerge.checkpoints.layout import PICKLED
from adamerge.checkpoints.open_clip_source import PREFIX as OPEN_CLIP
from adamerge.checkpoints.open_clip_source import open_clip_folder
from adamerge.data.tasks import EMBEDDED
from adamerge.documents import require_source
from adamerge.errors import InputError, nearest
from adamerge.hub import nowhere, snapshot

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model"]


def local_path(source: str | Path, role: str) -> Path:
    """Give a path as it is, or the local copy of a hub repository where no such path exists.

    Raises:
        InputError: There is no such path, and it is no hub id.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    require_source(role, str(source))
    path = Path(source)
    if path.exists():
        return path
    mistyped = nowhere(str(source))
    if mistyped is None:
        return fetch(str(source), role)
    problem, hint = mistyped
    raise InputError(f"{role}: {problem}", hint or "Give a safetensors file, a model folder or a hub id.")


def locate(path: str, role: str = "model") -> Path:
    """Give the local path that a user names: a path, a hub id, ``open_clip:...`` or ``embedded:NAME``.

    Args:
        path: What the user wrote.
        role: Who this is ("base", "expert 'cars'"), for messages.

    Raises:
        InputError: There is no such path, no such embedded model, or none of open_clip's (see
            `open_clip_folder`).
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    if path.startswith(OPEN_CLIP):
        return open_clip_folder(path)
    if not path.startswith(EMBEDDED):
        return local_path(path, role)
    shipped = {"base": zoo.base()} | zoo.experts()
    name = path.removeprefix(EMBEDDED)
    if name not in shipped:
        raise InputError(f"embedded model {name!r} is unknown.", nearest(name, shipped))
    return shipped[name]


def fetch(repo_id: str, role: str) -> Path:
    """Download (or find in the local cache) a model repository's safetensors and configs.

    A repository from before safetensors is converted once: see `with_safetensors`.

    Raises:
        EnvironmentProblem: The hub cannot be reached and the repository is not cached.
    """
    folder = snapshot(repo_id, role, _WANTED)
    if any(folder.rglob("*.safetensors")):
        return folder
    return with_safetensors(snapshot(repo_id, role, [*_WANTED, *PICKLED]), repo_id)
