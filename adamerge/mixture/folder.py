"""A mixture as a folder: safetensors, JSON, the backbone's configuration and a model card."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge import coefficients
from adamerge.atomic import atomic_folder, refuse_existing, require_free_space
from adamerge.checkpoints import copy_companions, local_path, open_checkpoint, save_tensors
from adamerge.coefficients import Routing
from adamerge.dataflow import Flow, FlowBackbone
from adamerge.dataflow.flow import FOREIGN
from adamerge.errors import AdamergeError, InputError, shortlist
from adamerge.mixture.checking import (
    Misfit,
    require_digests,
    require_no_strange_tensors,
    require_structure,
    require_whole,
    seal,
)
from adamerge.mixture.model import Mixture
from adamerge.models import Backbone, Head, ModuleBackbone, Residual, open_backbone
from adamerge.models.heads import LAYERS
from adamerge.models.opening import format_of
from adamerge.models.own_layers import OwnLayers
from adamerge.state import State
from adamerge.vectors import Block, DenseBlock, LowRankBlock, SparseBlock, TaskVectors
from adamerge.vectors.ternary import TernaryBlock

DOCUMENT, WEIGHTS, HEADS = "adamerge.json", "model.safetensors", "heads.safetensors"
_SCHEMA = 3  # for heads with layers; else what older versions read: 2 with a residual or a flow, or 1
_BLOCKS: dict[str, Any] = {b.__name__: b for b in (DenseBlock, LowRankBlock, SparseBlock, TernaryBlock)}


def save_mixture(
    mixture: Mixture,
    out: str | Path,
    *,
    like: str | Path | None = None,
    card: str = "",
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a mixture so that `load` gives a module of equal outputs.

    What the backbone does not read (a text tower) is left out.

    Args:
        mixture: The model.
        out: Folder to make.
        like: The base's folder, whose configuration, tokenizer and processor are copied; without it the
            folder loads only with `load(out, backbone=...)`.
        card: Text of the folder's README.md.
        provenance: Where the model comes from: digests, configuration; written as it is.
        overwrite: Replace ``out`` if it exists; the old one stays until the new one is complete.

    Raises:
        InputError: ``out`` exists, ``like`` is in no known format, or the experts are stored in files of
            their own.
        EnvironmentProblem: The disk is full or not writable.
    """
    out = Path(out)
    refuse_existing(out, overwrite=overwrite)
    if like is not None:
        format_of(Path(like))
    tensors, blocks = _packed(mixture)
    require_free_space(out.parent, sum(tensor.nbytes for tensor in tensors.values()))
    document = _header(mixture.heads, mixture.classes, provenance) | {
        "kind": "mixture",
        "tasks": list(mixture.vectors.tasks),
        "routing": _describe_routing(mixture.routing),
        "blocks": blocks,
        "aliases": {a: name for a, name in mixture.vectors.aliases.items() if name in mixture.read},
    }
    if isinstance(mixture.backbone, FlowBackbone):
        version = max(2, document["schema_version"])
        document |= {"schema_version": version, "flow": mixture.backbone.flow.document()}
    with atomic_folder(out, overwrite=overwrite) as folder:
        if like is not None:
            copy_companions(Path(like), folder)
        save_tensors(tensors, folder / WEIGHTS)
        _write_document(folder, seal(document, folder))
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def write_companions(
    folder: Path,
    heads: Mapping[str, Head],
    classes: Mapping[str, Sequence[str]],
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write beside a static model's own checkpoint what `load` needs of its tasks: heads and class names."""
    save_tensors(_head_tensors(heads), folder / HEADS)
    document = _header(heads, classes, provenance) | {"kind": "checkpoint"}
    _write_document(folder, seal(document, folder))


def load(folder: str | Path, backbone: Backbone | None = None) -> Mixture:
    """Load a model that adamerge saved, static or routed, for inference.

    No code of the folder runs: weights are safetensors, the rest is JSON. The folder is checked whole first:
    names, shapes, dtypes and digests of its files, and one input through all of it.

    Args:
        folder: The folder, or a hub id.
        backbone: The architecture, where the folder does not hold the base's configuration.

    Returns:
        A module in evaluation mode; see `Mixture.predict`.

    Raises:
        InputError: The folder holds no such model, a newer one, or a damaged one.
    """
    path = local_path(folder, "model")
    document = _document(path)
    try:
        require_structure(document)
        if document["kind"] == "checkpoint":
            mixture = _static(path, document, backbone or open_backbone(path, classifiers=_reads(document)))
        else:
            tensors = open_checkpoint(path / WEIGHTS, role="model")
            require_no_strange_tensors(tensors, document)
            names = {name.removeprefix("shared/"): name for name in tensors if name.startswith("shared/")}
            names |= {alias: names[name] for alias, name in document["aliases"].items()}
            own = {name: file for name, file in names.items() if not name.startswith(FOREIGN)}
            backbone = backbone or open_backbone(path, tensors.renamed(own), classifiers=_reads(document))
            mixture = _mixture(tensors, document, _flowing(backbone, document))
        require_digests(document, path)
        require_whole(mixture.eval(), path)
    except AdamergeError:
        raise
    except Exception as error:  # whatever its parts make torch stumble over, the folder is what is wrong
        kind = "" if isinstance(error, Misfit) else f"{type(error).__name__} "
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        raise InputError(
            f"{path} is damaged: {kind}{reason}.", "Copy it again, or save the model again."
        ) from error
    return mixture


def _reads(document: Mapping[str, Any]) -> bool:
    """Return whether heads were experts' classifiers, which have names in the experts' files."""
    return any(head.get("names") for head in document["heads"].values())


def _static(path: Path, document: Mapping[str, Any], backbone: Backbone) -> Mixture:
    state = open_checkpoint(path, role="model")
    shared = {name: state[name].clone() for name in backbone.names}
    heads = _heads(document["heads"], open_checkpoint(path / HEADS, role="heads"), backbone)
    return Mixture(TaskVectors((), {}, shared, None), backbone, heads, None, document["classes"])


def _mixture(tensors: State, document: Mapping[str, Any], backbone: Backbone) -> Mixture:
    routing = _routing(document["routing"])
    vectors, heads = _vectors(document, tensors), _heads(document["heads"], tensors, backbone)
    mixture = Mixture(vectors, backbone, heads, routing, document["classes"])
    strange = [name for name in vectors.base_state() if name not in mixture.read]
    if strange:
        raise InputError(
            f"the backbone does not read {shortlist(strange)} of the model.",
            "Give the architecture, and the prefix, that it was saved with.",
        )
    if routing is not None:
        routing.load_state_dict(_under("router/", tensors))
    return mixture


def _flowing(backbone: Backbone, document: Mapping[str, Any]) -> Backbone:
    """Lead a backbone through the blocks of a model that was found in data-flow space."""
    if "flow" not in document:
        return backbone
    if not isinstance(backbone, ModuleBackbone):
        raise InputError("this model's blocks stand in another order.", "Give a ModuleBackbone.")
    return FlowBackbone(backbone, Flow.read(document["flow"]))


def _packed(mixture: Mixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give all tensors by name in the file, and what JSON says of the blocks."""
    read = mixture.read
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, block in mixture.vectors.blocks.items():
        if name in mixture.routed:
            described[name] = _describe(name, block, tensors)
        if name in read:
            tensors[f"shared/{name}"] = block.base_tensor()
    tensors |= {f"shared/{name}": x for name, x in mixture.vectors.rest.items() if name in read}
    tensors |= _head_tensors(mixture.heads)
    if mixture.routing is not None:
        tensors |= {f"router/{name}": x for name, x in mixture.routing.state_dict().items()}
    return tensors, described


def _describe(name: str, block: Block, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(block).__name__
    if kind not in _BLOCKS:
        raise InputError(f"{name} is stored as {kind}, which has no form in a file.", "Use codec='low_rank'.")
    described: dict[str, Any] = {"kind": kind}
    for field in dataclasses.fields(block):  # pyright: ignore[reportArgumentType]  # all known blocks are dataclasses
        value = getattr(block, field.name)
        if not field.init or field.name == "base":
            continue
        if isinstance(value, Tensor):
            tensors[f"experts/{name}/{field.name}"] = value
        else:
            described[field.name] = value
    return described


def _describe_routing(routing: Routing | None) -> dict[str, Any] | None:
    return None if routing is None else {"kind": type(routing).__name__, "options": routing.options()}


def _head_tensors(heads: Mapping[str, Head]) -> dict[str, Tensor]:
    named = ((task, *item) for task, head in heads.items() for item in head.tensors.items())
    return {f"heads/{task}/{name}": tensor.detach() for task, name, tensor in named}


def _header(
    heads: Mapping[str, Head], classes: Mapping[str, Sequence[str]], provenance: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "schema_version": max(map(_version_of, heads.values()), default=1),
        "heads": {task: {"normalize": h.normalize, **_origins(h)} for task, h in heads.items()},
        "classes": {task: list(names) for task, names in classes.items()},
        "provenance": dict(provenance or {}),
    }


def _version_of(head: Head) -> int:
    """Give the oldest schema that can describe a head."""
    if head.layers is not None:
        return _SCHEMA
    return 1 if head.residual is None else 2


def _origins(head: Head) -> dict[str, Any]:
    """Give the names that a head's tensors have in the expert's own files."""
    return {"names": dict(head.names)} if head.names else {}


def _write_document(folder: Path, document: Mapping[str, Any]) -> None:
    (folder / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / DOCUMENT).read_text(encoding="utf-8"))
        version = document["schema_version"]
        is_newer = version > _SCHEMA
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path} holds no model of adamerge: it has no {DOCUMENT}.",
            "Give the model folder of a run of `adamerge fit` (RUN/merged).",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path / DOCUMENT} is damaged: {reason}.", "Copy it again.") from error
    if is_newer:
        raise InputError(f"{path} was written by a newer adamerge (schema {version}).", "Update adamerge.")
    return document


def _vectors(document: Mapping[str, Any], tensors: State) -> TaskVectors:
    shared = _under("shared/", tensors)
    blocks: dict[str, Block] = {}
    for name, described in document["blocks"].items():
        fields = {key: _plain(value) for key, value in described.items() if key != "kind"}
        fields |= _under(f"experts/{name}/", tensors)
        blocks[name] = _BLOCKS[described["kind"]](base=shared.pop(name), **fields)
    missing = [name for name in document["aliases"].values() if name not in blocks and name not in shared]
    if missing:
        raise InputError(f"the model lacks {shortlist(missing)}.", "Copy it again.")
    shared |= {alias: shared[name] for alias, name in document["aliases"].items() if name in shared}
    aliases = {alias: name for alias, name in document["aliases"].items() if name in blocks}
    return TaskVectors(tuple(document["tasks"]), blocks, shared, None, aliases=aliases)


def _heads(described: Mapping[str, Any], tensors: State, backbone: Backbone) -> dict[str, Head]:
    heads = {}
    for task, options in described.items():
        own = _under(f"heads/{task}/", tensors)
        residual = Residual(own["down"], own["up"]) if "up" in own else None
        more = {"residual": residual, "layers": _layers(task, own, backbone)}
        names = options.get("names", {})
        weight, bias = _as_float(own["weight"]), own.get("bias")
        bias = None if bias is None else _as_float(bias)
        heads[task] = Head(weight, bias, options["normalize"], names=names, **more)
    return heads


def _as_float(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"a head has dtype {tensor.dtype}")
    return tensor.float()


def _layers(task: str, own: Mapping[str, Tensor], backbone: Backbone) -> OwnLayers | None:
    """Give a head's own layers, which the backbone's library computes."""
    found = {name.removeprefix(LAYERS): tensor for name, tensor in own.items() if name.startswith(LAYERS)}
    if not found:
        return None
    model = getattr(backbone, "own_model", None)
    if model is None or {*model.names} != {*found}:
        raise InputError(
            f"the head of {task!r} has layers of its own ({shortlist(found)}), which do not fit the model.",
            "Load the folder with the configuration and the weights that it was saved with.",
        )
    return OwnLayers(model, found)


def _routing(described: Mapping[str, Any] | None) -> Routing | None:
    if described is None:
        return None
    kind = getattr(coefficients, described["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, Routing)):
        raise InputError(f"there is no routing {described['kind']!r}.", "Update adamerge.")
    return kind(**described["options"])


def _under(prefix: str, tensors: State) -> dict[str, Tensor]:
    """Read tensors into memory of their own: sums over mapped files, aligned otherwise, round otherwise."""
    cut = len(prefix)
    return {name[cut:]: tensors[name].clone() for name in tensors if name.startswith(prefix)}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
