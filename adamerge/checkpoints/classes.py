"""What the rows of a classifier mean, as the configuration beside its weights says."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.checkpoints.configs import read_settings
from adamerge.errors import InputError

_PLACEHOLDER = re.compile(r"LABEL_\d+")


def class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the names of a classifier's rows, in the order of the rows.

    Names are read from ``id2label`` and ``label2id`` (transformers) or ``label_names`` (timm) of
    ``config.json``. Numbers as names are names; two rows may have the same name.

    Args:
        folder: A model folder; a file, or a folder without ``config.json``, has no names.

    Returns:
        The names, or None where the configuration has none: neither mapping stands there, its names are the
        placeholders LABEL_0, LABEL_1, ..., or timm's names leave rows out.

    Raises:
        InputError: ``id2label`` and ``label2id`` contradict each other, do not number the rows 0 to n - 1,
            or are no mappings, or ``config.json`` is damaged.
    """
    file = folder / "config.json"
    settings = read_settings(file) if folder.is_dir() else {}
    if "architecture" in settings:  # timm's key
        return _timm_names(settings)
    by_row = _rows_of(file, settings, "id2label", reverse=False)
    by_name = _rows_of(file, settings, "label2id", reverse=True)
    if by_row and by_name:
        _require_agreement(file, by_row, by_name)
    rows = dict(by_row or by_name)
    if not rows:
        return None
    if sorted(rows) != list(range(len(rows))):
        raise InputError(
            f"{file} names the rows {_shown(sorted(rows))} of its classifier, not 0 to {len(rows) - 1}.",
            "Correct id2label and label2id there.",
        )
    return tuple(rows[row] for row in range(len(rows)))


def _timm_names(settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return timm's names, a list or a mapping from rows, which stand at one of two places."""
    for part in (settings, settings.get("pretrained_cfg") or {}):
        names = part.get("label_names") or part.get("labels")
        if isinstance(names, Sequence) and not isinstance(names, str):
            return tuple(map(str, names))
        if isinstance(names, Mapping):
            rows = {str(row): str(name) for row, name in names.items()}
            is_whole = rows.keys() == {str(row) for row in range(len(rows))}
            return tuple(rows[str(row)] for row in range(len(rows))) if is_whole else None
    return None


def _rows_of(file: Path, settings: Mapping[str, Any], key: str, *, reverse: bool) -> list[tuple[int, str]]:
    """Return (row, name) pairs of one mapping; none where it is absent or holds placeholders."""
    mapping = settings.get(key) or {}
    try:
        pairs = [(item[1], item[0]) if reverse else item for item in mapping.items()]
        rows = [(int(row), str(name)) for row, name in pairs]
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{key} of {file} is {_shown(mapping)}, no mapping between rows and names.",
            "Correct it there.",
        ) from error
    return [] if all(_PLACEHOLDER.fullmatch(name) for _, name in rows) else rows


def _require_agreement(file: Path, by_row: list[tuple[int, str]], by_name: list[tuple[int, str]]) -> None:
    names = dict(by_row)
    for row, name in by_name:
        if names.get(row) != name:
            raise InputError(
                f"id2label and label2id of {file} contradict each other: row {row} is {names.get(row)!r} in "
                f"id2label and {name!r} in label2id.",
                "Correct the wrong one there.",
            )
    unnamed = set(names.values()) - {name for _, name in by_name}
    if unnamed:
        raise InputError(
            f"id2label and label2id of {file} contradict each other: label2id lacks {sorted(unnamed)[0]!r}.",
            "Correct the wrong one there.",
        )


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
