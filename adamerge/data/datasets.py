"""A source's images: all of them, decoded once, or a few at a time."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, tensor
from torch.utils.data import Dataset

from adamerge.data.corruptions import Corrupt, library_versions, make_corruption
from adamerge.data.decoded import Decoded, decode_all, decode_once, digests_of
from adamerge.data.decoding import Preprocess, decode, require_regular, require_same_size
from adamerge.data.rows import Rows, open_rows
from adamerge.data.sources import Source, find_source
from adamerge.data.tasks import EMBEDDED, embedded_source
from adamerge.data.texts import require_text_columns, text_columns, tokens_of
from adamerge.digests import sha256_of_all
from adamerge.errors import AdamergeWarning, DataError, shortlist
from adamerge.progress import track

CORRUPT_CEILING = 0.01
Whole = UInt8[Tensor, "whole channel height width"] | Int64[Tensor, "whole field token"]


@dataclass(frozen=True)
class Origin:
    """Where images come from, for messages and for the matching of names.

    Attributes:
        source: What the user wrote; empty where that is not known.
        skipped: Rows of the source that could not be decoded and are no images.
        words: Whether the class names are the labels that occur, in an order that means nothing.
        classes: Class names of the source, whether labels were kept or not.
    """

    source: str = ""
    skipped: tuple[int, ...] = ()
    words: bool = False
    classes: tuple[str, ...] = ()

    def row_of(self, image: int) -> int:
        """Return the row of the source in which an image stands."""
        for skipped in self.skipped:
            image += skipped <= image
        return image


class Images(Dataset[dict[str, Tensor]]):
    """Decoded images (or the tokens of texts) of one task, with or without labels.

    Args:
        images: All pixels, in memory or in a mapped file; or tokens.
        labels: One per image, or None where they are absent or were dropped.
        class_names: What the source calls its labels, in label order; empty where it does not say.
        digests: SHA-256 of each image, where they are known.
        rows: Which of the images are meant, and labels and digests belong to; default: all.
        origin: Where they come from.
    """

    def __init__(
        self,
        images: Whole,
        labels: Int64[Tensor, " image"] | None = None,
        class_names: tuple[str, ...] = (),
        *,
        digests: UInt8[Tensor, "image 32"] | None = None,
        rows: Int64[Tensor, " image"] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.labels, self.class_names = labels, class_names
        self.origin = origin or Origin()
        self._whole, self._rows, self._known_digests = images, rows, digests

    @property
    def images(self) -> Tensor:
        """All images at once; those of a part are read into memory."""
        return self._whole if self._rows is None else self._whole[self._rows]

    @property
    def noun(self) -> str:
        """What messages call them: "images", or "texts" where they are tokens with their mask."""
        is_text = self._whole.dtype == torch.int64 and self._whole.shape[1] > 1
        return "texts" if is_text else "images"

    def __len__(self) -> int:
        return len(self._whole if self._rows is None else self._rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Give a ready batch in one piece (torch's loaders ask for it)."""
        index = tensor(indices)
        batch = {"images": self._whole[self._places(index)], "index": index}
        return [batch if self.labels is None else batch | {"labels": self.labels[index]}]

    def sample(self, count: int, seed: int = 0) -> "Images":
        """Give some of the images, drawn without replacement, in order; all where there are fewer."""
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.part(drawn.sort().values)

    def part(self, index: Int64[Tensor, " image"]) -> "Images":
        """Give the images at these indices; no pixel is copied."""
        labels, digests = (None if x is None else x[index] for x in (self.labels, self._known_digests))
        options: dict[str, Any] = {"digests": digests, "rows": self._places(index), "origin": self.origin}
        return Images(self._whole, labels, self.class_names, **options)

    def with_labels(self, labels: Int64[Tensor, " image"]) -> "Images":
        """Return the same images under other labels; no pixel is copied."""
        options: dict[str, Any] = {"digests": self._known_digests, "rows": self._rows, "origin": self.origin}
        return Images(self._whole, labels, self.class_names, **options)

    def digests(self) -> list[bytes]:
        """Hash each decoded image, once, to tell equal images apart from different ones."""
        return self._digests

    def _places(self, index: Tensor) -> Tensor:
        return index if self._rows is None else self._rows[index]

    @cached_property
    def _digests(self) -> list[bytes]:
        known = self._known_digests
        return [bytes(row) for row in (digests_of(self.images) if known is None else known).numpy()]


def load_images(
    source: str,
    preprocess: Preprocess,
    *,
    labelled: bool,
    role: str,
    image_column: str | None = None,
    label_column: str | None = None,
    corruption: str | None = None,
    transform_key: str | None = None,
    columns: Sequence[str] = (),
    modality: str | None = None,
) -> Images:
    """Load, decode and preprocess all images of a source.

    Args:
        source: ``embedded:TASK/SPLIT``, or what `find_source` reads: a folder of images, a parquet file
            or folder, a folder written by `save_to_disk`, or a hub id, with ``#CONFIG`` and ``@SPLIT``.
        preprocess: From a PIL image to uint8 ``[3, height, width]``.
        labelled: Keep labels; otherwise they are dropped here and reach nobody.
        role: Who asks ("task 'cars', test images"), for messages.
        image_column: Column of the images; default: image, img, jpg, jpeg, png or webp. Or of texts; default:
            text or sentence.
        label_column: Column of the labels; default: label, fine_label, cls or labels.
        corruption: ``NAME/SEVERITY``, applied before preprocessing.
        transform_key: Names the preprocessing completely, so that its results are kept in the cache
            folder and mapped from there the next time; default: nothing is kept.
        columns: Columns of the texts: one, or two of a pair; default: see `text_columns`.
        modality: "image" or "text": what the model reads; default: whatever the source holds.

    Raises:
        DataError: Nothing is there, labels are wanted and absent, too many images are corrupt, or the
            preprocessing gives several sizes.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    if source.startswith(EMBEDDED):
        from adamerge.data.embedded import load_split

        images, labels = load_split(*embedded_source(source))
        return Images(images, labels if labelled else None)
    rows = open_rows(find_source(source, role), role)
    warn_of_left_out(rows.source, role)
    texts = text_columns(rows, columns, image_column)
    if modality == "text":
        require_text_columns(rows, texts)
    column = "" if texts else rows.image_column(image_column)
    named = rows.label_column(label_column) if labelled else None
    labels = None if named is None else rows.labels(named)
    names = rows.class_names(named) if named else ()
    words = bool(named) and rows.names_are_words(named)
    if texts:
        origin = Origin(source, (), words, rows.declared_names(label_column))
        found = tokens_of(rows, texts, preprocess)
        return Images(found.tokens, labels, names, digests=found.digests, origin=origin)
    found = _decoded(rows, column, preprocess, corruption, transform_key)
    if found.skipped:
        told = f"{role}: skipped {shortlist(found.skipped.values())}."
        warnings.warn(told, AdamergeWarning, stacklevel=2)
    kept = None if labels is None else labels[[row for row in range(len(rows)) if row not in found.skipped]]
    origin = Origin(source, tuple(sorted(found.skipped)), words, rows.declared_names(label_column))
    return Images(found.images, kept, names, digests=found.digests, origin=origin)


def warn_of_left_out(source: Source, role: str) -> None:
    """Name the files of a source that are not read."""
    if source.left_out:
        told = f"{role}: these were left out: {shortlist(source.left_out)}."
        warnings.warn(told, AdamergeWarning, stacklevel=3)


class Chunk(NamedTuple):
    """Some consecutive images of a source.

    Attributes:
        paths: Where each lies; None where the source does not tell.
        problems: Why each could not be decoded; None where it was.
        images: Those that were decoded, in order, as the preprocessing gives them.
        texts: The texts themselves, by column; empty where these are images.
    """

    paths: list[str | None]
    problems: list[str | None]
    images: list[Tensor]
    texts: Mapping[str, list[str | None]] = {}


class ImageStream:
    """A source's images in its own order, decoded a few at a time; labels are not read.

    Nothing is left out silently: an image that cannot be decoded is told in its place; a folder's files
    whose suffix is no image's, hidden images, further links to one file, and images beside parquet files
    are named in a warning.

    Args:
        source: As for `load_images`.
        role: Who asks, for messages.
        image_column: As for `load_images`.

    Raises:
        DataError: Nothing is there.
    """

    def __init__(self, source: str, role: str, image_column: str | None = None) -> None:
        self._encoded: Callable[[], Iterator[Any]]
        if source.startswith(EMBEDDED):
            from adamerge.data.embedded import load_split

            images = load_split(*embedded_source(source))[0]
            self._encoded, self._length = (lambda: iter(images)), len(images)
            return
        found = find_source(source, role)
        rows = open_rows(found, role)
        self._encoded, self._length = partial(rows.images, rows.image_column(image_column)), len(rows)
        warn_of_left_out(found, role)

    def __len__(self) -> int:
        return self._length

    def chunks(self, preprocess: Preprocess, size: int) -> Iterator[Chunk]:
        """Decode ``size`` images after another (the last time fewer)."""
        encoded = self._encoded()
        while values := list(islice(encoded, size)):
            found = [decode(value, preprocess) for value in values]
            yield Chunk(
                [value.get("path") if isinstance(value, dict) else None for value in values],
                [each if isinstance(each, str) else None for each in found],
                [each for each in found if isinstance(each, Tensor)],
            )


def _decoded(
    rows: Rows, column: str, preprocess: Preprocess, corruption: str | None, transform_key: str | None
) -> Decoded:
    """Decode, or map what was decoded before where the transform has a name."""
    decode_rows = partial(_decode_rows, rows, column, preprocess, corruption)
    if not transform_key or not rows.holds_its_images(column):
        return decode_all(decode_rows())
    from PIL import __version__ as pillow

    try:
        require_regular(*rows.source.files)
        digest = sha256_of_all(rows.source.files)
    except OSError:  # a file that cannot be read is told as an image that cannot be decoded
        return decode_all(decode_rows())
    corrupted_by = corruption and [corruption, *library_versions()]
    parts = [digest, column, corrupted_by, transform_key, pillow]
    return decode_once(decode_rows, json.dumps(parts), len(rows))


def _decode_rows(
    rows: Rows, column: str, preprocess: Preprocess, corruption: str | None
) -> Iterator[Tensor | str]:
    """Give every row's image, or its name and why there is none; refuse many of these, and unequal sizes."""
    corrupt = make_corruption(corruption) if corruption else None
    problems: list[str] = []
    first: tuple[str, Tensor] | None = None
    for index, value in enumerate(track(rows.images(column), f"Decoding {rows.role}", len(rows))):
        found = decode(value, partial(_corrupted, preprocess, corrupt, index) if corrupt else preprocess)
        name = rows.name_of(index, value)
        if isinstance(found, str):
            problems.append(f"{name} ({found})")
            yield problems[-1]
            continue
        first = first or (name, found)
        require_same_size(rows.role, first, (name, found))
        yield found
    if len(problems) > CORRUPT_CEILING * len(rows):
        told = f"{len(problems)} of {len(rows)} images cannot be decoded: {shortlist(problems, 3)}."
        raise DataError(f"{rows.role}: {told}", "Remove or repair them; at most 1 % is skipped.")


def _corrupted(preprocess: Preprocess, corrupt: Corrupt, index: int, image: Any) -> Tensor:
    return preprocess(corrupt(image, index))
