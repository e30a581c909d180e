"""`adamerge convert`: a pickled checkpoint as safetensors, without running anything of it."""

import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from adamerge import __version__
from adamerge.atomic import exclusive, refuse_existing, require_free_space, write_text
from adamerge.checkpoints import Checkpoint, open_checkpoint, save_tensors
from adamerge.checkpoints.contents import choose, tensors_in
from adamerge.checkpoints.diagnosis import in_units, is_pickled
from adamerge.checkpoints.layout import INDEX, PICKLED_INDEX, converted_name
from adamerge.checkpoints.pickled import open_pickled, read_all
from adamerge.checkpoints.stored import StoredTensor
from adamerge.checkpoints.unpickling import Standin
from adamerge.digests import sha256
from adamerge.documents import read_object
from adamerge.errors import InputError, shortlist

Stored = TypeVar("Stored", StoredTensor, Tensor)
_SIZES = {(768, 32): "ViT-B-32", (768, 16): "ViT-B-16", (1024, 14): "ViT-L-14"}
# A layout, how its patch embedding and its blocks are named, and what its text tower has.
_LAYOUTS = (
    ("open_clip", "visual.conv1.weight", r"visual\.transformer\.resblocks\.\d+\.", "transformer.resblocks."),
    (
        "Hugging Face CLIP",
        "vision_model.embeddings.patch_embedding.weight",
        r"vision_model\.encoder\.layers\.\d+\.",
        "text_model.encoder.",
    ),
    ("open_clip, without 'visual.'", "conv1.weight", r"transformer\.resblocks\.\d+\.", "token_embedding"),
    ("timm", "patch_embed.proj.weight", r"blocks\.\d+\.", "text."),
)


def convert(
    old: str, *, out: str | None = None, key: str = "", strip: str = "", overwrite: bool = False
) -> int:
    """Write the tensors of a pickled checkpoint as a safetensors file; nothing of the old file is run.

    Reads what torch.save and pickle.dump write: state dicts, training checkpoints, whole modules whose
    classes exist no more (their tensors get the names of their state dict), TorchScript archives. A file
    that asks to import what no checkpoint needs is refused.

    Args:
        old: The pickled file (.pt, .pth, .bin, .ckpt, .pkl), the index of pickled shards
            (pytorch_model.bin.index.json), or a safetensors file whose names are to be stripped.
        out: The file to write; default: beside the old one, under the name that readers look for:
            model.safetensors for pytorch_model.bin, else the old name with the suffix .safetensors.
        key: Which part of the file is wanted, where it holds several: state_dict, model.visual, ...
        strip: What to take off the beginning of the tensors' names.
        overwrite: Replace the output if it exists.
    """
    source = Path(old)
    if source.name == PICKLED_INDEX and out is None and not key and not strip:
        return _convert_shards(source, overwrite=overwrite)
    target = Path(out) if out else source.with_name(converted_name(source))
    if out is None and target == source:
        raise InputError(f"{source} would be written over.", "Give another file to write: --out FILE")
    refuse_existing(target, overwrite=overwrite, inputs={"the old file": source})
    if source.suffix == ".safetensors" and not is_pickled(source):
        lines = _rewrite(source, target, key, strip)
    else:
        lines = _convert_pickle(source, target, key, strip)
    sys.stdout.write("\n".join([*lines, ""]))
    return 0


def _convert_pickle(source: Path, target: Path, key: str, strip: str) -> list[str]:
    """Write the tensors of one pickled file, and return the lines that describe them."""
    with open_pickled(source) as document:
        kind = document.origin if isinstance(document, Standin) else "a dictionary"
        try:
            part, left = choose(document, key)
            stored = _stripped({name or "weight": t for name, t in tensors_in(part).items()}, strip)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        require_free_space(target.parent, sum(tensor.n_bytes for tensor in stored.values()))
        tensors = read_all(stored, source)
    _save(tensors, source, target)
    lines = [f"{source} holds {kind}.", *_report(target, tensors)]
    lines += [f"Left out: {shortlist(left, 12)}."] if left else []
    return [*lines, *_described(tensors)]


def _rewrite(source: Path, target: Path, key: str, strip: str) -> list[str]:
    """Write a safetensors file's tensors under shorter names, and return the lines that describe them."""
    if key:
        raise InputError(f"{source} is a safetensors file, which has no key {key!r}.", "Leave --key out.")
    checkpoint: Checkpoint = open_checkpoint(source, role=str(source))
    require_free_space(target.parent, source.stat().st_size)
    tensors = _stripped({name: checkpoint[name] for name in checkpoint}, strip)
    _save(tensors, source, target)
    return [*_report(target, tensors), *_described(tensors)]


def _convert_shards(source: Path, *, overwrite: bool) -> int:
    """Convert all shards of a pickled index, and write the index of the new files after them."""
    places = read_object(source).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{source} is damaged or no index of shards beside it.", "Download it again.")
    renamed = {name: converted_name(Path(name)) for name in dict.fromkeys(names)}
    absent = [name for name in renamed if not source.with_name(name).is_file()]
    if absent:
        problem = f"{source}: {len(absent)} of {len(renamed)} shards are missing: {shortlist(absent)}."
        raise InputError(problem, "Download the others.")
    for name in [*renamed.values(), INDEX]:
        refuse_existing(source.with_name(name), overwrite=overwrite)
    weight_map: dict[str, str] = {}
    for name, new in renamed.items():
        lines = _convert_pickle(source.with_name(name), source.with_name(new), "", "")
        sys.stdout.write("\n".join([*lines, ""]))
        weight_map |= dict.fromkeys(open_checkpoint(source.with_name(new), role=new), new)
    size = sum(source.with_name(new).stat().st_size for new in renamed.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_text(source.with_name(INDEX), json.dumps(index, indent=2))
    return 0


def _save(tensors: Mapping[str, Tensor], source: Path, target: Path) -> None:
    metadata = {"format": "pt", "source": source.name, "source_sha256": sha256(source)}
    with exclusive(target):
        save_tensors(tensors, target, metadata | {"converted_by": f"adamerge {__version__}"})


def _stripped(stored: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """Take a prefix off the names that have it."""
    if prefix and not any(name.startswith(prefix) for name in stored):
        raise InputError(f"no name begins with {prefix!r}.", f"Names begin with: {_prefixes(stored)}.")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    if len(renamed) < len(stored) or not {"", "__metadata__"}.isdisjoint(renamed):  # safetensors' own name
        raise InputError(f"without {prefix!r}, two names are the same, or one cannot be.", "Strip less.")
    return renamed


def _report(target: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Tell what was written."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    counts = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    size = in_units(target.stat().st_size)
    return [f"{target}: {len(tensors)} tensors ({counts}), {size}.", f"Names: {_prefixes(tensors)}."]


def _prefixes(names: Collection[str]) -> str:
    """Count what names begin with, after what they all begin with."""
    shared, heads = "", Counter[str]()
    while len(heads) <= 1:
        shared += "".join(f"{head}." for head in heads)
        rest = [name.removeprefix(shared).split(".") for name in names]
        heads = Counter(parts[0] for parts in rest)
        if any(len(parts) == 1 for parts in rest):
            break
    return shortlist((f"{shared}{head} ({count})" for head, count in heads.most_common()), 8)


def _described(tensors: Mapping[str, Tensor]) -> list[str]:
    """Recognise a model by the names of its patch embedding and blocks."""
    for layout, patches, blocks, text in _LAYOUTS:
        found = (m for name in tensors if (m := re.fullmatch(rf"(.*\.|){re.escape(patches)}", name)))
        for prefix in (match[1] for match in found):
            shape = tensors[prefix + patches].shape
            rows = (re.match(re.escape(prefix) + blocks, name) for name in tensors)
            depth = len({row[0] for row in rows if row})
            if depth and len(shape) == 4:
                part = "model" if any(n.startswith(prefix + text) for n in tensors) else "image encoder"
                known = _SIZES.get((shape[0], shape[-1]))
                size = f"{known}: " * bool(known) + f"width {shape[0]}, patch {shape[-1]}, {depth} blocks"
                looks = f"It looks like the {part} of {layout} ({size})"
                hint = f" under the prefix {prefix!r}; for a base in that layout: --strip {prefix}"
                return [looks + (hint if prefix else ".")]
    return []
