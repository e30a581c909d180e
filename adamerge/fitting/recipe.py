"""The method of a run: the default recipe under what a command line names, and all of it in one line."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from adamerge import coefficients, spaces
from adamerge.coefficients import Routing
from adamerge.errors import InputError
from adamerge.fitting.classes import class_named
from adamerge.progress import console
from adamerge.shipped import as_argument, default_recipe, named_parts, names_a_method, recipe_under
from adamerge.task import published_adam

_DEFAULTS = {  # of `merge_task`
    "coefficients": "Learned(initial=0.3)",
    "objective": "Entropy",
    "optimizer": "Adam(lr=0.001)",
}
_ROUTED = ("coefficients", "objective", "optimizer")


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """Put the default recipe under a command line whose files name no method.

    What the command line names takes the place of the recipe's part; all other parts stay the recipe's.

    Raises:
        InputError: A part that is named cannot stand beside the recipe's others.
    """
    if not arguments or not {"-h", "--help"}.isdisjoint(arguments) or names_a_method(arguments):
        return list(arguments)
    parts = named_parts(arguments)
    _require_static(parts)
    if arguments[0] == "fit" and "--print_config" not in arguments:
        but = f" but for {', '.join(parts)}" if parts else ""
        used = f"the default recipe is used ({default_recipe().name}){but}."
        console.print(f"No method is named: {used}", soft_wrap=True)
    return [arguments[0], "--config", as_argument(recipe_under(parts)), *arguments[1:]]


def _require_static(parts: Mapping[str, str]) -> None:
    """Refuse a router on top of a recipe of static coefficients."""
    kind = class_named(parts.get("coefficients", ""), (coefficients, spaces))
    missing = [part for part in _ROUTED if part not in parts]
    if isinstance(kind, type) and issubclass(kind, Routing) and missing:
        raise InputError(
            f"{kind.__name__} makes another model for every input, and the default recipe's "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} made for one static model.",
            f"Use a method file such as configs/methods/twin_merging.yaml, or name {', '.join(missing)} too.",
        )


def in_one_line(settings: Any) -> str:
    """Return what a run learns, and how, from its resolved configuration."""
    model = settings["model"]
    parts = [f"{part} {_part(model.get(part)) or name}" for part, name in _DEFAULTS.items()]
    parts += [f"adapters {_part(model['adapters'])}"] if model.get("adapters") is not None else []
    for part in ("edit", "shared"):
        options = _options(model.get(f"{part}_options"))
        parts += [f"{part} {model[part]}{options}"] if model.get(part) else []
    parts += ["relative to the base"] if model.get("relative_to") == "base" else []
    codec = model.get("codec", "fp32")
    parts += [f"codec {codec}{_options(model.get('codec_options'))}"] if codec != "fp32" else []
    parts += [f"decay {model.get('decay', 'none')}", f"{settings['trainer']['max_steps']} steps"]
    return "; ".join(parts)


def _part(part: Any) -> str:
    """Return a class and those of its options that are not its defaults; its learning rate always."""
    if part is None or part is published_adam:
        return ""
    if not isinstance(part, Mapping | Namespace):
        return type(part).__name__
    path, options = str(part["class_path"]), part.get("init_args") or {}
    kept = dict(_told(path, dict(options)))
    return path.rpartition(".")[2] + _options(kept)


def _told(path: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    kind = class_named(path, ())
    known = inspect.signature(kind).parameters if callable(kind) else {}
    for name, value in options.items():
        if name in ("lr", "initial", "temperature") or name not in known or known[name].default != value:
            yield name, value


def _options(options: Any) -> str:
    """Return options in brackets; parts of their own by their names."""
    if not options:
        return ""
    items = options.items() if isinstance(options, Mapping) else vars(options).items()
    return f"({', '.join(f'{name}={_plain(value)}' for name, value in items)})"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    has_class = isinstance(value, Mapping | Namespace) and "class_path" in value
    return _part(value) if has_class else str(value)
