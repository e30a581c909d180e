"""What names and shapes tell: whether a task can be a file, and how an expert differs from the base."""

import re
from collections.abc import Iterable, Mapping, Sequence

from adamerge.errors import InputError, brief

Shape = tuple[int, ...]
PREFIXES = ("module.", "model.", "vision_model.", "visual.", "image_encoder.", "image_encoder.model.")
_SPECIAL = '/\\:*?"<>|[]'  # of paths, patterns and markup
_TAKEN = (  # by digests and by columns of our tables
    *("base", "shared model", "step", "task", "entropy"),
    *("method", "mean", "normalized", "unseen", "task unknown", "source"),
)
_HINT = "Use letters, digits, '-', '_'."
_LONGEST = 100  # bytes of a name: files add to it
_TOWERS = ("visual.", "vision_model.")  # an image tower alone is a complete expert of a CLIP
_PATCHES = re.compile(r"(.*\.)?(conv1|conv_proj|projection|patch_embedding|patch_embed\.proj)\.weight")
_WIDTHS = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}
_LAYER = re.compile(r"\b(?:layers?|resblocks|blocks?|h)\.(\d+)\.")
_VOCABULARY = re.compile(r"embed_tokens|token_embedding|word_embeddings|\bwte\b|lm_head|\bshared\b|vocab")
# What quantisation methods store beside or instead of a weight: GPTQ and AWQ, bitsandbytes, fp8 and
# compressed-tensors, HQQ, torchao, quanto, AQLM, EETQ, ModelOpt.
_QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|g_idx|SCB|weight_format|(nested_)?absmax|(nested_)?quant_map|quant_state\..*"
    r"|weight_scales?(_inv|_2)?|weight_zero_point|weight_packed|weight_shape|(weight|input)_global_scale"
    r"|W_q|weight:_data.*|weight_qdata|_weight_(qdata|scale.*)|weight\._(data|scale|shift)|codebooks|qscales?)"
    r"|(.*\.)?weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)"
)
# What such methods name the like of `weight`, where it is an integer: MXFP4, zero points.
_CODES = re.compile(r"(?!(.*\.)?(num|n)_).*_(blocks|scales|codes|zp|zeros?|zero_points?)")
_LORA = re.compile(r"(.*\.)?lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b.*")
_WEIGHT = re.compile(r"(.*\.)?(weight|weights|bias|in_proj_weight|kernel|embedding)")


def require_file_names(tasks: Iterable[object]) -> None:
    """Check that every task's name can name files, and columns and rows of tables.

    Raises:
        InputError: A name is no text or cannot be a file name, is taken, or two names differ only in case.
    """
    folded: dict[str, str] = {}
    for name in tasks:
        require_name(name, "task")
        assert isinstance(name, str)  # or it was refused
        if folded.setdefault(name.casefold(), name) != name:
            raise InputError(f"tasks {folded[name.casefold()]!r} and {name!r} differ only in case.")


def require_name(name: object, kind: str) -> None:
    """Check that a name can name files, and columns and rows of tables.

    Args:
        name: The name.
        kind: What it names: "task" or "expert".

    Raises:
        InputError: It is no text, has characters that file names cannot have, or is taken.
    """
    if not isinstance(name, str):
        raise InputError(
            f"{kind} name {brief(name)} is a {type(name).__name__}, not a text.", f"Quote it: '{name}': ..."
        )
    is_clean = name.isprintable() and name == name.strip() and not set(name) & set(_SPECIAL)
    if not name or not is_clean or name.startswith(".") or len(name.encode()) > _LONGEST:
        raise InputError(f"{kind} name {brief(name)} cannot be a file name.", _HINT)
    if name in _TAKEN:
        raise InputError(f"{kind} name {name!r} is taken: tables and digests use it.", "Choose another.")


def require_title(key: str, text: str) -> None:
    """Check that a text can stand in a table.

    Raises:
        InputError: It is blank, long, or has control characters.
    """
    if not text.strip() or not text.isprintable() or len(text) > _LONGEST:
        raise InputError(f"{key}={brief(text)} cannot be a title.", _HINT)


def needed_of(base: Iterable[str], expert: Iterable[str]) -> list[str]:
    """Give the names that an expert must have: all, or one tower's where it holds nothing else."""
    base, expert = list(base), list(expert)
    for tower in _TOWERS:
        if expert and all(name.startswith(tower) for name in expert):
            return [name for name in base if name.startswith(tower)] or base
    return base


def missing_hint(missing: Sequence[str], extra: Sequence[str], *, all_missing: bool = False) -> str:
    """Name the prefix whose removal or addition would make the names agree, or say how to go on."""
    if any(_LORA.fullmatch(name) for name in extra):
        return "Of an adapter, give the folder."
    for prefix in PREFIXES:
        if any(name.removeprefix(prefix) in missing for name in extra if name.startswith(prefix)):
            return f"The expert's names carry the prefix {prefix!r}: strip it."
        if any(prefix + name in missing for name in extra):
            return f"The expert's names lack the prefix {prefix!r}: add it."
    if all_missing:
        return "It shares no name with the base: is it of the same architecture, in the same format?"
    return f"If that is meant, {_passing('allow_missing')}"


def extra_hint(extra: Iterable[str]) -> str:
    """Recognise a quantised expert, or LoRA that is not merged, by its names, or say how to go on."""
    if any(is_of_quantisation(name) for name in extra):
        return "It looks quantised: dequantise first."
    if any(_LORA.fullmatch(name) for name in extra):
        return "They are LoRA matrices: merge them with PEFT (merge_and_unload), and give what that saves."
    return f"If they may be left out, {_passing('exclude')}"


def is_of_quantisation(name: str) -> bool:
    """Return whether a tensor's name is one that only quantised models have, such as ``qweight``."""
    return _QUANTISED.fullmatch(name) is not None


def is_weight(name: str) -> bool:
    """Return whether a name is that of a weight, which no model stores as integers unless it is quantised."""
    return _WEIGHT.fullmatch(name) is not None or _CODES.fullmatch(name) is not None


def keep_hint(names: Sequence[str], others: Iterable[str]) -> str:
    """Return how the base's values of some tensors are kept, and no others'."""
    return f"To keep the base's values, {_passing('exclude', patterns_of(names, others))}"


def patterns_of(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return few patterns that match all of some names, and none of the others.

    Args:
        names: What is to be matched; what shares its first parts becomes one pattern (``classifier.*``).
        others: What may not be matched.
    """
    others, patterns = [*set(others).difference(names)], dict[str, None]()
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        head = next((h for h in heads if not any(other.startswith(h) for other in others)), "")
        shared = sum(other.startswith(head) for other in names) > 1 if head else False
        patterns[f"{head}*" if shared else name] = None
    return [*patterns]


def shape_hint(differing: Mapping[str, tuple[Shape, Shape]]) -> str:
    """Tell two vocabularies by the shapes that differ (expert's, base's), or say how to go on."""
    for name, (theirs, ours) in differing.items():
        if _VOCABULARY.search(name) and theirs[1:] == ours[1:]:
            rows = [n for n, (a, b) in differing.items() if _resized(a, theirs[0], ours[0]) == b]
            told = f"Vocabularies of {theirs[0]} vs {ours[0]} tokens."
            return f"{told} To keep the base's, {_passing('exclude', rows)}"
    return f"Another architecture? To keep the base's values, {_passing('exclude')}"


def looks_like(expert: Mapping[str, Shape], base: Mapping[str, Shape]) -> str:
    """Say what two models look like where they look different: ``ViT-B/16 vs ViT-B/32``."""
    pairs = zip(_traits(expert), _traits(base), strict=True)
    different = [pair for pair in pairs if all(pair) and pair[0] != pair[1]]
    theirs, ours = (", ".join(side) for side in zip(*different, strict=True)) if different else ("", "")
    return f"Looks like {theirs} vs {ours}." if different else ""


def _passing(option: str, patterns: Sequence[str] = ()) -> str:
    """Say how an option is given in Python, and to the commands that have it."""
    words = " ".join(f"--{option} {pattern}" for pattern in patterns or ["PATTERN"])
    listed = [*patterns] or "[PATTERN, ...]"
    return f"pass {option}={listed} (adamerge merge, inspect and compress: {words})."


def _resized(shape: Shape, old: int, new: int) -> Shape:
    return tuple(new if size == old else size for size in shape)


def _traits(shapes: Mapping[str, Shape]) -> tuple[str, str]:
    """Give a vision transformer's name and a model's depth, or nothing where they cannot be told."""
    patches = next((s for n, s in shapes.items() if len(s) == 4 and _PATCHES.fullmatch(n)), (0, 0, 0, 0))
    vit = f"ViT-{_WIDTHS[patches[0]]}/{patches[2]}" if patches[0] in _WIDTHS else ""
    layers = [int(number) for name in shapes for number in _LAYER.findall(name)]
    depth = max(layers, default=-1) + 1
    return vit, f"{depth} layer{'s' if depth > 1 else ''}" if depth else ""
