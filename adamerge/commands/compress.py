"""`adamerge compress` and `decompress`: an expert as a small file, and back as a checkpoint."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adamerge.atomic import refuse_existing
from adamerge.checkpoints import locate, open_checkpoint, save_stream
from adamerge.commands.merge import OutputDtype
from adamerge.commands.sources import Sources
from adamerge.compression import Header, information_bound, open_compressed, save_compressed
from adamerge.errors import InputError
from adamerge.progress import console, track
from adamerge.state import info
from adamerge.static.compeft import Value, ternarise
from adamerge.vectors import TaskVectors

_ROLE = "expert"


def compress(
    base: str,
    expert: str,
    out: str,
    *,
    density: float = 0.2,
    alpha: float = 1.0,
    value: Value = "std",
    allow_missing: list[str] | None = None,
    exclude: list[str] | None = None,
    merge_classifier: bool = False,
    force: bool = False,
    overwrite: bool = False,
) -> int:
    """Store an expert as a ternary task vector (ComPEFT, arXiv:2311.13171), Golomb-coded.

    Args:
        base: The base: a folder in Hugging Face or open_clip layout, a safetensors file, or a hub id.
        expert: The expert, in the base's layout or as a PEFT LoRA folder.
        out: The file to write.
        density: Fraction of the task vector's entries that is kept, by magnitude over the whole model.
        alpha: Factor of the value that they get.
        value: What that value is alpha times of: "std", the standard deviation of the task vector, or
            "mean", the mean magnitude of the kept entries.
        allow_missing: Patterns of tensor names that the expert may lack; the base's values stand.
        exclude: Patterns of tensor names that stay the base's, whatever the expert holds.
        merge_classifier: Store the last layer of a classifier although the configurations do not name the
            same classes: otherwise the base's stays, and is told.
        force: Accept an expert that looks as if it came from another base.
        overwrite: Replace the output if it exists.
    """
    target = Path(out)
    refuse_existing(target, overwrite=overwrite, inputs={"the base": base, "the expert": expert})
    if density == 1:
        raise InputError("density=1 leaves the vector as it is: nothing is compressed.", "Use e.g. 0.2.")
    sources = Sources.find(base, [f"{_ROLE}={expert}"], force=force)
    more: dict[str, bool] = {"merge_classifier": merge_classifier, "force": force}
    vectors = sources.open(allow_missing or (), exclude or (), **more)
    recipe = {"method": "compeft", "density": density, "alpha": alpha, "value": value}
    recipe |= {"without": list(vectors.layers.kept)} if vectors.layers.kept else {}
    rule = ternarise(vectors.stacks("Measuring"), density=density, alpha=alpha, value=value)
    figures = _Figures()
    stream = _ternary(vectors, rule, figures)
    header = save_compressed(
        stream,
        target,
        base=vectors.origins.base,
        recipe=recipe,
        aliases=vectors.aliases,
        overwrite=overwrite,
    )
    _report(target, header, figures)
    return 0


def decompress(
    base: str,
    file: str,
    out: str,
    *,
    dtype: OutputDtype | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> int:
    """Write the checkpoint of a compressed expert, in the base's layout.

    Args:
        base: The base that it was compressed with.
        file: The file that `adamerge compress` wrote.
        out: The file (where the base is a file) or folder to write.
        dtype: Dtype of the written floating-point tensors, to which base + vector is rounded; default: the
            base's, tensor by tensor.
        force: Accept another base than the one that the file names.
        overwrite: Replace the output if it exists.
    """
    refuse_existing(Path(out), overwrite=overwrite, inputs={"the base": base, "the compressed expert": file})
    layout = locate(base, "base")
    state = open_compressed(file, open_checkpoint(layout, role="base"), force=force)
    sizes = [math.prod(state.info(name).shape) for name in state]
    asked = None if dtype is None else getattr(torch, dtype)
    tensors = track(state.items(), "Decompressing", sizes)
    written = save_stream(
        tensors, out, like=layout, dtype=asked, overwrite=overwrite, metadata={"adamerge": "decompressed"}
    )
    console.print(f"{file}: {len(state.header.streams)} of {len(state)} tensors differ from the base.")
    console.print(f"The checkpoint is {written}.")
    return 0


@dataclass
class _Figures:
    """Sizes and squared norms, gathered piece by piece."""

    dense_bytes: int = 0
    vector: float = 0.0
    ternary: float = 0.0
    difference: float = 0.0

    def add(self, vector: Tensor, ternary: Tensor) -> None:
        self.vector += _square(vector)
        self.ternary += _square(ternary)
        self.difference += _square(vector - ternary)

    @property
    def error(self) -> float:
        """Norm of the difference / norm of the vector."""
        return math.sqrt(self.difference / self.vector) if self.vector else 0.0

    @property
    def cosine(self) -> float:
        product = (self.vector + self.ternary - self.difference) / 2
        return product / math.sqrt(self.vector * self.ternary) if self.ternary else 0.0


def _square(row: Tensor) -> float:
    return float(row.double().square().sum())


def _ternary(
    vectors: TaskVectors, rule: Callable[[Tensor], Tensor], figures: _Figures
) -> Iterator[tuple[str, Tensor]]:
    """Walk the ternary vector; at the end, refuse an expert of another base."""
    state = vectors.origins.experts[_ROLE]
    for name, block in vectors.stacks("Compressing").walk():
        ternary = torch.empty(block.shape[1:])
        flat = ternary.view(-1)
        for span, piece in block.pieces():
            flat[span] = rule(piece)[0]
            figures.add(piece[0], flat[span])
        figures.dense_bytes += info(state, name).n_bytes if name in state else 0
        yield name, ternary
    vectors.origins.check()


def _report(out: Path, header: Header, figures: _Figures) -> None:
    size, entries = out.stat().st_size, header.entries
    bound = information_bound(entries, header.kept) / entries
    lines = (
        f"{out}: {size} bytes, {figures.dense_bytes / size:.1f} times less than the dense task vector "
        f"({figures.dense_bytes} bytes)",
        f"{8 * size / entries:.4f} bits per entry; information bound {bound:.4f}",
        f"{header.kept} of {entries} entries kept ({header.kept / entries:.2%}; asked: "
        f"{header.recipe['density']:.2%}, and all that equal the smallest kept), as ±{header.scale:.4g}",
        f"relative reconstruction error {figures.error:.4f}, cosine {figures.cosine:.4f}",
    )
    sys.stdout.write("\n".join([*lines, ""]))
