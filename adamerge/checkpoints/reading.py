"""Reads safetensors files, Hugging Face folders (single or sharded) and open_clip folders, lazily."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.checkpoints.diagnosis import in_units, refusal
from adamerge.checkpoints.header import DTYPES, Entry, read_header
from adamerge.checkpoints.hub import local_path
from adamerge.checkpoints.layout import (
    INDEX,
    conversion,
    holds_model,
    refuse_quantised_settings,
    variants,
    weight_file,
)
from adamerge.checkpoints.modules import transformer_folder
from adamerge.digests import sha256
from adamerge.errors import InputError, shortlist
from adamerge.state import TensorInfo

_SAFETENSORS, _JSON = ".safetensors", ".json"


class Checkpoint(Mapping[str, Tensor]):
    """A lazy map from parameter names to tensors, over one or several safetensors files.

    Headers are read once. A tensor is mapped into memory when it is asked for, alone, and its map goes
    with it, so that a walk over a model keeps no more than the tensors in use.

    Args:
        root: The file or folder that was opened.
        files: The safetensors files, in the order of their index.
        index: The index that names the files, where there is one.

    Attributes:
        outside: Names of whole modules that only this checkpoint or only its base has, such as heads.
        dialect: How the names in the files were changed, for people; empty where they are as they stand.
    """

    def __init__(self, root: Path, files: tuple[Path, ...], index: Path | None = None) -> None:
        self.root, self.files, self.index = root, files, index
        self.outside: frozenset[str] = frozenset()
        self.dialect = ""
        self.metadata: dict[Path, dict[str, str]] = {}
        self._entries: dict[str, Entry] = {}
        for file in files:
            _require_valid(file)
            entries, self.metadata[file] = read_header(file)
            self._entries |= entries
        self._identities = {file: _identity(file) for file in files}
        if not self._entries:
            raise InputError(f"checkpoint {root} holds no tensors.", "Was it saved completely?")

    def __getitem__(self, name: str) -> Tensor:
        file, _, shape, start, stop = self.entry(name)
        dtype = self.info(name).dtype
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        storage: Any = torch.UntypedStorage.from_file(str(file), False, stop)[start:stop]
        if start % dtype.itemsize:
            storage = storage.clone()  # a file of another writer, whose header is not padded
        return torch.empty(0, dtype=dtype).set_(storage).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def info(self, name: str) -> TensorInfo:
        """Give the shape and dtype of a tensor without reading its values.

        Raises:
            InputError: The file stores a dtype that torch does not have.
        """
        file, dtype, shape, *_ = self._entries[name]
        if dtype not in DTYPES:
            raise InputError(
                f"{file}: tensor {name} has dtype {dtype}.", "It looks quantised: dequantise first."
            )
        return TensorInfo(shape, DTYPES[dtype])

    def entry(self, name: str) -> Entry:
        """Tell where a tensor lies, for reading it without mapping it.

        Raises:
            InputError: The file has changed since it was opened, so that nobody knows.
        """
        entry = self._entries[name]
        if _identity(entry.file) != self._identities[entry.file]:
            raise InputError(
                f"{entry.file} has changed since it was opened.", "Start again with the new file."
            )
        return entry

    def renamed(
        self, names: Mapping[str, str], outside: frozenset[str] = frozenset(), dialect: str = ""
    ) -> "Checkpoint":
        """Return the same files under other names, and without the tensors that have none.

        Args:
            names: From each new name to the old one; a tensor may have several.
            outside: See the attribute.
            dialect: See the attribute.
        """
        view = copy(self)
        view._entries = {new: self._entries[old] for new, old in names.items()}
        view.outside, view.dialect = outside, dialect
        return view

    def file_digest(self, *, fresh: bool = False) -> str:
        """Hash the bytes of all files (SHA-256), which stands for this checkpoint in reports.

        Args:
            fresh: Read the bytes whatever is remembered of them.
        """
        digests = [bytes.fromhex(sha256(file, fresh=fresh)) for file in self.files]
        return hashlib.sha256(b"".join(digests)).hexdigest()


def open_checkpoint(path: str | Path, *, role: str = "checkpoint") -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Of several files in a folder, the one is opened that the folder's own library would read.

    Args:
        path: A ``.safetensors`` file, a folder in Hugging Face or open_clip layout, or a hub id.
        role: Who this is ("base", "expert 'cars'"), for error messages.

    Raises:
        InputError: The path is missing, holds no safetensors, or a file is damaged; or the folder holds
            quantised weights by its configuration, or an adapter beside full weights.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    root = local_path(path, role)
    try:
        if not root.is_dir():
            return Checkpoint(root, (root,))
        refuse_quantised_settings(root)
        file, inner = weight_file(root), transformer_folder(root)
        if file is None and inner != root:
            return _rooted(open_checkpoint(inner, role=role), root)
        if file is None:
            raise _without_weights(root)
        if file.suffix == _JSON and file.stem.endswith(f"{_SAFETENSORS}.index"):
            return _open_shards(root, file)
        if file.suffix != _SAFETENSORS:
            raise _pickled(file)
        return Checkpoint(root, (file,))
    except InputError as error:
        raise InputError(f"{role}: {error}") from error


def _rooted(found: Checkpoint, root: Path) -> Checkpoint:
    """Return a checkpoint of a sub-folder as the folder's own."""
    found.root = root
    return found


def _without_weights(root: Path) -> InputError:
    """Return the error that says what a folder holds instead of weights."""
    if (root / "adapter_config.json").exists():
        return InputError(
            f"{root} is a PEFT adapter.",
            "Merge it into its base first: PeftModel.from_pretrained(...).merge_and_unload().",
        )
    if named := variants(root):
        return InputError(
            f"{root} holds no {INDEX.partition('.index')[0]}, but the variant {shortlist(named)}.",
            f"Readers look for it only when asked: give {root / named[0]}, or rename it."
            if named[0].endswith(_SAFETENSORS)
            else "Readers look for it only when asked: rename it without the variant's name.",
        )
    return InputError(
        f"{root} holds none of {INDEX}, open_clip_model.safetensors, model.safetensors.",
        f"It holds: {shortlist(sorted(p.name for p in root.iterdir())) or 'nothing'}.{_nearby(root)}",
    )


def _nearby(root: Path) -> str:
    """Return which file or sub-folder may be meant instead: as archives and trainings leave them."""
    paths = sorted(root.iterdir())
    broken = [path for path in paths if path.is_symlink() and not path.exists()]
    if broken:
        return f" {broken[0].name} is a link to what is not there."
    models = [path for path in paths if path.is_dir() and holds_model(path)]
    files = [path for path in paths if path.is_file() and path.suffix == _SAFETENSORS]
    if len(models) == 1 or len(files) == 1:
        return f" Is {(models or files)[0]} meant?"
    return ""


def _pickled(file: Path) -> InputError:
    """Return the error that says how pickled weights can be read."""
    if file.suffix == _JSON:
        return InputError(f"{file} names pickled shards, which can run code.", conversion(file))
    return refusal(file)


def _open_shards(root: Path, file: Path) -> Checkpoint:
    index = _read_index(file)
    shards = sorted(set(index["weight_map"].values()))
    absent = [shard for shard in shards if not (root / shard).exists()]
    if absent:
        present = sorted(root.glob("*.safetensors"))
        total, here = index.get("metadata", {}).get("total_size"), sum(p.stat().st_size for p in present)
        raise InputError(
            f"{root}: {len(absent)} of {len(shards)} shards are missing: {shortlist(absent)}"
            + (f"; {in_units(here, total)} are there." if isinstance(total, int) else "."),
            f"Present: {shortlist(p.name for p in present) or 'none'}. Download the others.",
        )
    checkpoint = Checkpoint(root, tuple(root / shard for shard in shards), file)
    lost = [
        name
        for name, shard in index["weight_map"].items()
        if name not in checkpoint or checkpoint.entry(name).file != root / shard
    ]
    if lost:
        raise InputError(
            f"{file} names tensors that its shards lack: {shortlist(lost)}.",
            "The index and the shards come from different saves: download both again.",
        )
    return checkpoint


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if all(Path(shard).name == shard for shard in index["weight_map"].values()):
            return index
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged or no index.", "Download it again.") from error
    raise InputError(f"{file} names shards in other folders.", "Put all shards beside it.")


def _require_valid(file: Path) -> None:
    """Let safetensors check the header: offsets that tile the file, known fields."""
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise refusal(file) from error


def _identity(file: Path) -> tuple[int, int, int]:
    """Tell a file from one that has taken its place."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise InputError(f"{file} is gone.", "Was it moved while it was being read?") from error
    return found.st_ino, found.st_size, found.st_mtime_ns
