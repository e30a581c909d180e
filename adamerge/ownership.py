"""What adamerge may remove: files that a list of its own names, and nothing else.

Every output folder holds a list, ``.adamerge-files``, that grows as files are written; a model's folder gets
it with its files. Folders of versions before the list are recognised by what only they hold, and their files
by the names that those versions wrote. Whatever else lies in a folder makes replacing it a refusal, links
included. What is replaced stays where it is until the new output, made in ``.adamerge-new``, is complete.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adamerge.errors import InputError, shortlist
from adamerge.locks import is_another_process, locked

LIST, LOCK, NEW = ".adamerge-files", ".adamerge-lock", ".adamerge-new"
_SWAP = ".adamerge-swap"  # in NEW: what is removed and moved, once the new output is complete
_OWN = frozenset((LIST, LOCK, NEW, _SWAP))
_TEMPORARY = re.compile(r"\.(.+)\.(tmp|old)-\d+")
Kind = Literal["run", "table", "model", "report", "folder"]

_MODEL = (
    r"README\.md|adamerge\.json|heads\.safetensors|(open_clip_)?model(-\d{5}-of-\d{5})?\.safetensors"
    r"|[\w-]+\.safetensors\.index\.json|(open_clip_|generation_|processor_|preprocessor_|tokenizer_"
    r"|video_preprocessor_|sentence_bert_)?config\.json|config_sentence_transformers\.json|modules\.json"
    r"|(tokenizer|special_tokens_map|added_tokens|vocab|chat_template)\.json|(vocab|merges)\.txt"
    r"|chat_template\.jinja|[\w.-]+\.model|bpe_simple_vocab_16e6\.txt\.gz|\d_\w+/config\.json"
)
_LOGGED = (  # by loggers, which name their files themselves
    r"wandb/(offline-)?run-\d{8}_\d{6}-\w+/(run-\w+\.wandb(\.synced)?|(files|logs|tmp)(/.*)?)"
    r"|(lightning_logs|\w+/lightning_logs)/version_\d+/(hparams\.yaml|metrics\.csv|events\.out\.tfevents\..*)"
)
_LINKS = re.compile(r"(.*/)?wandb/(latest-run|debug(-internal)?\.log)")
_NAMES: Mapping[Kind, str] = {  # what versions before the list wrote
    "run": (
        r"(config|hparams)\.yaml|(inputs|manifest|result)\.json|predictions\.csv|(curves|routing)\.(csv|png)"
        r"|coefficients\.(csv|png|safetensors)|wandb-run-id\.txt"
        r"|checkpoints/(last|epoch=\d+-step=\d+)(-v\d+)?\.ckpt"
    ),
    "table": (
        r"benchmark\.yaml|report\.md|search\.pt|results(_task_unknown)?\.(json|csv|md)"
        r"|accuracy(_bytes)?\.png|(coefficients|curves)\.(csv|png)"
        r"|(clean/)?(methods/[^/]+\.(stamp|begun)|methods/[^/]+/result\.json"
        r"|statistics/\w+-[0-9a-f]{16}(-[0-9a-f]{16})?\.(json|safetensors))"
    ),
    "model": _MODEL,
    "report": r"inspect\.(json|md)|(norms|cosine|sign_conflict|effective_rank)\.png",
    "folder": r"(?!)",
}
_NESTED = re.compile(r"(.*/)?merged|(clean/)?methods/[^/]+")
_EMPTY = re.compile(
    r"checkpoints|merged|(clean/)?(methods(/[^/]+)?|statistics)|(.*/)?(wandb|lightning_logs)(/.*)?"
)
_TABLE_ROOT = ("methods", "clean", "statistics", "merged")


class Survey(NamedTuple):
    """What a folder holds.

    Attributes:
        files: What adamerge wrote, by its path below the folder.
        unknown: What it did not write; folders end in "/".
    """

    files: list[str]
    unknown: list[str]


def survey(folder: Path) -> Survey:
    """Sort what a folder holds into files of adamerge and others; links are followed nowhere."""
    found = Survey([], [])
    if folder.is_dir():
        _walk(folder, "", _recognizer(folder), found)
    return found


def kind_of(folder: Path) -> Kind | None:
    """Return what an output folder is: by its list, or by what only earlier versions' folders hold."""
    header = next(_lines(folder), None)
    if isinstance(header, dict) and header.get("kind") in _NAMES:
        return header["kind"]
    return next((kind for kind, holds in _EVIDENCE.items() if holds(folder)), None)


def is_empty(folder: Path) -> bool:
    """Return whether a folder is missing, or holds nothing but what a killed process held."""
    return not folder.is_dir() or set(os.listdir(folder)) <= {LOCK, LIST}


def require_ours(target: Path) -> None:
    """Refuse to replace what adamerge did not write: a file, or a folder that holds anything else.

    Raises:
        InputError: What the replacement would destroy.
    """
    if target.is_dir():
        unknown = survey(target).unknown
        if unknown:
            raise InputError(
                f"{target} holds what adamerge did not write: {shortlist(unknown)}.",
                "Move that away, or choose another output.",
            )
    elif not _is_our_file(target):
        raise InputError(
            f"{target} cannot be replaced: adamerge did not write it.", "Remove it, or choose another output."
        )


def protect(target: Path, inputs: Mapping[str, str | Path]) -> None:
    """Refuse an output that would replace an input, hold it or lie in it.

    Args:
        target: The file or folder to write.
        inputs: What is read, by its role; what is no local path is passed over.

    Raises:
        InputError: What the output would destroy.
    """
    out = target.resolve()
    for role, path in inputs.items():
        with contextlib.suppress(OSError, ValueError):
            source = Path(path).resolve()
            if not Path(path).exists():
                continue
            if out == source or out in source.parents or (source in out.parents and source.is_dir()):
                raise InputError(
                    f"the output {target} would replace {role} ({path}).", "Choose another path."
                )


class Claim:
    """A folder that this process writes to, and the list of what it wrote there.

    Args:
        folder: The folder.
        kind: What it is.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.kind: Kind = kind
        self.is_written = (self.folder / LIST).exists()
        self.names = set(_names(self.folder)) if self.is_written else set(survey(self.folder).files)

    def note(self, name: str) -> None:
        """Add a file, or a folder with a list of its own, to the list."""
        if name in self.names and self.is_written:
            return
        self.names.add(name)
        if self.is_written:
            with (self.folder / LIST).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(name) + "\n")
        else:
            temporary = self.folder / f"{LIST}.{os.getpid()}"
            write_list(temporary, self.kind, self.names)
            os.replace(temporary, self.folder / LIST)
            self.is_written = True

    def holds(self, name: str) -> bool:
        """Return whether the list, or that of a folder within, names a file."""
        if name in self.names:
            return True
        outer = [n for n in self.names if n.endswith("/") and name.startswith(n)]
        return any(name.removeprefix(n) in survey(self.folder / n).files for n in outer)


_claims: list[Claim] = []


@contextlib.contextmanager
def claimed(folder: Path, kind: Kind, *, lock: bool = True) -> Iterator[Claim]:
    """Write to a folder within the block, as the only process: what is written there is listed.

    A replacement that was complete when its process was killed is put in place first.

    Args:
        folder: The folder, which is made.
        kind: What it is.
        lock: Keep other processes out.

    Raises:
        InputError: Another process writes to it; or, of a table's, files of others have its files' names.
    """
    absolute = Path(os.path.abspath(folder))
    active = next((claim for claim in _claims if claim.folder == absolute), None)
    if active is not None:
        yield active
        return
    if kind == "table":
        _require_room(folder)
    made = [path for path in (absolute, *absolute.parents) if not path.exists()]
    try:
        absolute.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, folder) if lock else contextlib.nullcontext():
            _finish_swap(absolute)
            claim = Claim(absolute, kind)
            _sweep(claim)
            if absolute.name != NEW:
                note(absolute, is_folder=True)
            _claims.append(claim)
            try:
                yield claim
            finally:
                _claims.remove(claim)
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def note(target: Path, *, is_folder: bool = False) -> None:
    """Add what is about to be written to the list of the innermost claimed folder that will hold it.

    Raises:
        InputError: Another's file has that name.
    """
    path = Path(os.path.abspath(target))
    around = [claim for claim in _claims if claim.folder in path.parents]
    if not around:
        return
    claim = max(around, key=lambda each: len(each.folder.parts))
    name = path.relative_to(claim.folder).as_posix()
    if os.path.lexists(path) and not is_folder and not claim.holds(name):
        raise InputError(f"{target} is in the way: adamerge did not write it.", "Move it away.")
    claim.note(f"{name}/" if is_folder else name)


def write_list(file: Path, kind: Kind, names: Iterable[str]) -> None:
    """Write the list of a folder's files."""
    lines = [{"adamerge": 1, "kind": kind}, *sorted(names)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def list_folder(folder: Path) -> None:
    """Write the list of all files of a folder that is complete and not visible yet."""
    names = [path.relative_to(folder).as_posix() for path in _leaves(folder)]
    write_list(folder / LIST, "folder", (name for name in names if Path(name).name != LIST))


def promote(folder: Path) -> None:
    """Put the complete new output, which lies in ``NEW``, in the place of the old one.

    Raises:
        InputError: A file of somebody else has the name of a new one; both outputs stay.
    """
    new, found = folder / NEW, survey(folder)
    incoming = [path.relative_to(new).as_posix() for path in _leaves(new)]
    incoming = [name for name in incoming if name not in _OWN]
    clash = [name for name in found.unknown if name in incoming]
    if clash:
        raise InputError(f"{folder}: {shortlist(clash)} would be lost.", f"The new output is in {new}.")
    temporary = new / f"{_SWAP}.{os.getpid()}"
    temporary.write_text(json.dumps({"old": found.files, "new": incoming}), encoding="utf-8")
    os.replace(temporary, new / _SWAP)
    _finish_swap(folder)
    for claim in _claims:
        if claim.folder == Path(os.path.abspath(folder)):
            claim.names = set(_names(folder))


def discard_new(folder: Path) -> None:
    """Remove a new output that was not completed; all of it is this program's."""
    new = folder / NEW
    if new.is_dir() and not new.is_symlink():
        shutil.rmtree(new, ignore_errors=True)


def _sweep(claim: Claim) -> None:
    """Remove temporaries of dead processes beside the files of a list."""
    for folder in {claim.folder, *((claim.folder / name).parent for name in claim.names)}:
        for path in folder.iterdir() if folder.is_dir() else ():
            is_temporary = _TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
            if is_temporary and not is_another_process(int(path.name.rpartition("-")[2])):
                shutil.rmtree(path, ignore_errors=True)


def _finish_swap(folder: Path) -> None:
    """Do, or go on with, what `promote` has decided: nothing is decided again."""
    new = folder / NEW
    if not (new / _SWAP).is_file():
        return
    plan = json.loads((new / _SWAP).read_text(encoding="utf-8"))
    for name in plan["new"]:
        if os.path.lexists(new / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
    for name in sorted(set(plan["old"]) - set(plan["new"])):
        _remove_file(folder, name)
    if (new / LIST).exists():
        os.replace(new / LIST, folder / LIST)
    discard_new(folder)


def _remove_file(folder: Path, name: str) -> None:
    """Remove a file, and the folders that it leaves empty."""
    path = folder / name
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with contextlib.suppress(OSError):
        while path.parent != folder:
            path = path.parent
            path.rmdir()


class _Recognizer(NamedTuple):
    names: frozenset[str]
    pattern: re.Pattern[str]

    def is_file(self, name: str) -> bool:
        return name in self.names or self.pattern.fullmatch(name) is not None

    def is_nested(self, name: str) -> bool:
        return f"{name}/" in self.names or (not self.names and _NESTED.fullmatch(name) is not None)


def _recognizer(folder: Path) -> _Recognizer:
    """Return what knows the files of a folder: its list, or the names that earlier versions wrote."""
    kind, listed = kind_of(folder), frozenset(_names(folder))
    patterns = [] if kind is None else [_LOGGED] if kind in ("run", "table") else []
    if kind is not None and not listed:
        patterns += [_NAMES[kind], *map(re.escape, _indexed(folder) if kind == "model" else ())]
    return _Recognizer(listed, re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)"))


def _walk(folder: Path, prefix: str, ours: _Recognizer, found: Survey) -> None:
    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
        name = prefix + entry.name
        if not prefix and entry.name in _OWN:
            if entry.name == LIST:
                found.files.append(name)
        elif entry.is_symlink():
            is_logged = _LINKS.fullmatch(name) and ours != _NOBODY
            (found.files if is_logged else found.unknown).append(name)
        elif entry.is_dir():
            _enter(Path(entry), name, ours, found)
        elif entry.is_file() and ours.is_file(name):
            found.files.append(name)
        else:
            found.unknown.append(name)


def _enter(folder: Path, name: str, ours: _Recognizer, found: Survey) -> None:
    """Sort what a folder within holds: by its own list, or as a part of the one around it."""
    inner = Survey([], [])
    if _TEMPORARY.fullmatch(folder.name) and ours != _NOBODY:
        inner.files.extend(path.relative_to(folder).as_posix() for path in _leaves(folder))
    elif ours.is_nested(name) and kind_of(folder) is not None:
        inner = survey(folder)
        inner.files.extend([LOCK] if (folder / LOCK).is_file() else [])
        inner.files.extend(path.relative_to(folder).as_posix() for path in _leaves(folder / NEW))
    else:
        _walk(folder, f"{name}/", ours, found_here := Survey([], []))
        inner = Survey(*([n.removeprefix(f"{name}/") for n in part] for part in found_here))
    is_known = inner.files or (not inner.unknown and _EMPTY.fullmatch(name) and ours != _NOBODY)
    found.files.extend(f"{name}/{each}" for each in inner.files)
    found.unknown.extend([f"{name}/{each}" for each in inner.unknown] if is_known else [f"{name}/"])


def _leaves(folder: Path) -> Iterator[Path]:
    """Give all files and links at any depth of a folder."""
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


_NOBODY = _Recognizer(frozenset(), re.compile("(?!)"))


def _lines(folder: Path) -> Iterator[Any]:
    """Read the list's lines; a line that a kill cut off names nothing."""
    file = folder / LIST
    if file.is_file() and not file.is_symlink():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _names(folder: Path) -> Iterator[str]:
    return (line for line in _lines(folder) if isinstance(line, str))


def _require_room(folder: Path) -> None:
    """Refuse a folder of somebody else where a table's files would replace his.

    Raises:
        InputError: It holds such names, and is no table.
    """
    if is_empty(folder) or kind_of(folder) == "table":
        return
    pattern = re.compile(_NAMES["table"])
    clash = [name for name in os.listdir(folder) if name in _TABLE_ROOT or pattern.fullmatch(name)]
    if clash:
        raise InputError(
            f"{folder} holds no table of adamerge, and {shortlist(sorted(clash))} of somebody else.",
            "Choose another folder: --out DIR",
        )


def _document(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _is_run(folder: Path) -> bool:
    return {"schema_version", "weights", "data", "config"} <= _document(folder / "inputs.json").keys()


def _is_table(folder: Path) -> bool:
    return (folder / "benchmark.yaml").is_file() and any((folder / "methods").glob("*.stamp"))


def _is_report(folder: Path) -> bool:
    return {"problems", "vectors"} <= _document(folder / "inspect.json").keys()


def _is_model(folder: Path) -> bool:
    if {"schema_version", "kind"} <= _document(folder / "adamerge.json").keys():
        return True
    with contextlib.suppress(OSError, ValueError):
        if "\n# Merged by adamerge " in (folder / "README.md").read_text(encoding="utf-8"):
            return True
    return any(_is_our_file(file) for file in folder.glob("*.safetensors"))


_EVIDENCE: Mapping[Kind, Any] = {
    "run": _is_run,
    "table": _is_table,
    "model": _is_model,
    "report": _is_report,
}


def _indexed(folder: Path) -> Iterator[str]:
    """Give the weight files that a model's index names, and those that carry our mark."""
    for file in folder.glob("*.safetensors.index.json"):
        weights = _document(file).get("weight_map")
        yield from {str(name) for name in weights.values()} if isinstance(weights, dict) else ()
    yield from (file.name for file in folder.glob("*.safetensors") if _is_our_file(file))


def _is_our_file(file: Path) -> bool:
    """Return whether a single file is of a form that only adamerge writes."""
    if not file.is_file():
        return False
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return _is_index(file) or _has_mark(file) or _has_predictions(file) or _is_manifest(file)
    return False


def _is_index(file: Path) -> bool:
    """Look at the shards that an index names: whether all of them are ours."""
    if not file.name.endswith(".safetensors.index.json"):
        return False
    weights = _document(file).get("weight_map")
    shards = set(weights.values()) if isinstance(weights, dict) else set()
    return bool(shards) and all(_is_our_file(file.with_name(str(name))) for name in shards)


def _has_mark(file: Path) -> bool:
    """Look for our metadata in the header of a safetensors file."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 2 <= size <= min(10**8, file.stat().st_size):
            return False
        metadata = json.loads(stream.read(size)).get("__metadata__") or {}
    return not {"adamerge", "converted_by"}.isdisjoint(metadata) or (
        metadata.get("format") == "adamerge compressed expert"
    )


def _has_predictions(file: Path) -> bool:
    """Look for the columns of `adamerge predict` in the foot of a parquet file."""
    with file.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(end - 8, 0))
        tail = stream.read(8)
        if len(tail) < 8 or tail[4:] != b"PAR1":
            return False
        size = min(int.from_bytes(tail[:4], "little"), end - 8)
        stream.seek(end - 8 - size)
        foot = stream.read(size)
    return all(name in foot for name in (b"class_name", b"probability", b"problem", b"index"))


def _is_manifest(file: Path) -> bool:
    """Look for the lines of `adamerge data check --write`, and no others."""
    if file.suffix not in (".yaml", ".yml") or file.stat().st_size > 10**7:
        return False
    lines = file.read_text(encoding="utf-8").splitlines()
    known = r"\S.*:|  (n_test|n_adapt|digest|adapt_digest): .*|  classes:.*|  (  )?- .*|  +.*"
    return any(re.match(r"  (digest|adapt_digest): '?[0-9a-f]{64}", line) for line in lines) and all(
        re.fullmatch(known, line) for line in lines
    )
