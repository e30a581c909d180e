"""Which tensors share a coefficient: a map from tensor name to group label, per granularity."""

import re
from collections.abc import Callable, Sequence

from adamerge.errors import InputError, nearest

_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_KINDS = {
    "attn": re.compile(r"attn|attention|[qkv]_proj|out_proj"),
    "mlp": re.compile(r"mlp|fc\d|c_fc|c_proj|intermediate|feed_forward"),
    "norm": re.compile(r"(^|\.|_)(ln|norm|layernorm|layer_norm|bn)"),
}


def _task(name: str) -> str:
    """One coefficient per task (task-wise AdaMerging)."""
    return "all"


def _tensor(name: str) -> str:
    """One per task and tensor (the published layer-wise AdaMerging)."""
    return name


def _module(name: str) -> str:
    """Weight and bias of a module together."""
    return re.sub(r"[._](weight|bias)$", "", name)


def _block(name: str) -> str:
    """All tensors of a transformer block or stage together; tensors outside by module."""
    match = _BLOCK.match(name)
    return match[1] if match else _module(name)


def _type(name: str) -> str:
    """Attention, MLP and norm of each block apart; tensors outside by module."""
    match = _BLOCK.match(name)
    if not match:
        return _module(name)
    inside = name[match.end() :]
    kind = next((k for k, pattern in _KINDS.items() if pattern.search(inside)), "other")
    return f"{match[1]}.{kind}"


GROUPINGS: dict[str, Callable[[str], str]] = {
    "task": _task, "tensor": _tensor, "block": _block, "module": _module, "type": _type,
}  # fmt: skip


def group_of(names: Sequence[str], grouping: str) -> tuple[list[str], list[int]]:
    """Group tensor names.

    Args:
        names: Tensor names, in merge order.
        grouping: One of "task", "tensor", "block", "module", "type".

    Returns:
        The groups' labels in order of first appearance, and each tensor's group index.

    Raises:
        InputError: The grouping is unknown.
    """
    if grouping not in GROUPINGS:
        raise InputError(f"grouping {grouping!r} is unknown.", nearest(grouping, GROUPINGS))
    labels = [GROUPINGS[grouping](name) for name in names]
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    return list(order), [order[label] for label in labels]
