"""What lies in a pickled checkpoint: tensors by dotted name, and which of several sets is the model."""

from itertools import count
from typing import Any

from adamerge.checkpoints.stored import StoredTensor
from adamerge.checkpoints.unpickling import Standin
from adamerge.errors import InputError, nearest, shortlist

# What lies beside a model in training checkpoints.
_TRAINING = {
    *("optimizer", "optimizers", "optimizer_state_dict", "optimizer_states", "optim", "scaler"),
    *("scheduler", "lr_scheduler", "lr_schedulers", "loops", "callbacks", "rng_state", "random_state"),
    *("args", "hparams", "hyper_parameters"),
}
_STEPS, _DEPTH = 10**6, 100  # of a walk through containers that may hold one another


def is_module(value: Any) -> bool:
    """Tell a pickled ``torch.nn.Module``, whatever its class."""
    return isinstance(value, Standin) and {"_parameters", "_modules"} <= value.attributes.keys()


def children(value: Any) -> dict[str, Any]:
    """Give what lies in a container or object, by name; of a module its tensors and modules alone."""
    if isinstance(value, dict):
        return {str(name): part for name, part in value.items()}
    if isinstance(value, list | tuple):
        return {str(i): part for i, part in enumerate(value)}
    if not isinstance(value, Standin):
        return {}
    own = value.attributes
    if not is_module(value):
        return own | children(value.items) | children([*value.arguments, *value.entries])
    passing = own.get("_non_persistent_buffers_set") or ()
    buffers = {n: b for n, b in children(own.get("_buffers")).items() if n not in passing}
    return children(own["_parameters"]) | buffers | children(own["_modules"])


def tensors_in(value: Any) -> dict[str, StoredTensor]:
    """List every tensor in a container or object, by its dotted name: a module's as in its state dict.

    What contains itself is not walked twice.

    Raises:
        InputError: It is nested without end, or two tensors get the same name.
    """
    found: dict[str, StoredTensor] = {}
    steps = count()

    def walk(name: str, part: Any, above: tuple[int, ...]) -> None:
        if next(steps) == _STEPS or len(above) == _DEPTH:
            raise InputError("its objects are nested without end.", "It is no checkpoint.")
        if isinstance(part, StoredTensor):
            if name in found:
                raise InputError(f"it holds two tensors named {name}.", "Choose a part: --key NAME")
            found[name] = part
        elif id(part) not in above:
            for key, inner in children(part).items():
                walk(f"{name}.{key}" if name else key, inner, (*above, id(part)))

    walk("", value, ())
    return found


def choose(value: Any, key: str = "") -> tuple[Any, list[str]]:
    """Find the model among what a checkpoint holds.

    Args:
        value: What the file holds.
        key: Dotted path to the part that is wanted; default: the only part with tensors, what belongs to
            an optimizer and the like not counted.

    Returns:
        The part, and the names of the others beside it that hold tensors or anything else.

    Raises:
        InputError: Nothing or more than one part comes into question.
    """
    left: list[str] = []
    for step in filter(None, key.split(".")):
        parts = children(value)
        if step not in parts:
            raise InputError(f"there is no key {step!r} (of --key {key}).", nearest(step, parts))
        left, value = [name for name in parts if name != step], parts[step]
    while not key and not _is_model(value):
        parts = {n: tensors_in(v) for n, v in children(value).items()}
        found = {n: tensors for n, tensors in parts.items() if tensors and n not in _TRAINING}
        if _is_state(value, found):
            return {n: children(value)[n] for n in found}, left + [n for n in parts if n not in found]
        found = {n: tensors for n, tensors in found.items() if "" not in tensors}
        if len(found) != 1:
            raise _undecided({n: len(tensors) for n, tensors in parts.items() if tensors})
        left += [n for n in parts if n not in found]
        value = children(value)[next(iter(found))]
    return value, left


def _is_model(value: Any) -> bool:
    """Tell a pickled module, also one of TorchScript, from a container."""
    script = isinstance(value, Standin) and value.origin.startswith("__torch__.")
    return isinstance(value, StoredTensor) or is_module(value) or script


def _is_state(value: Any, found: dict[str, dict[str, StoredTensor]]) -> bool:
    """Tell a state dict: it holds tensors itself, beside parts of it not only a counter."""
    own = [part for n, part in children(value).items() if n in found and isinstance(part, StoredTensor)]
    return len(own) == len(found) > 0 or any(tensor.shape for tensor in own)


def _undecided(parts: dict[str, int]) -> InputError:
    if not parts:
        return InputError("it holds no tensors.", "Is it the right file?")
    listed = shortlist((f"{name} ({count} tensors)" for name, count in parts.items()), 12)
    best = next((name for name in parts if name not in _TRAINING), next(iter(parts)))
    return InputError(f"it holds several sets of tensors: {listed}.", f"Choose one: --key {best}")
