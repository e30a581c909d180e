"""TaskVectors: a base and its experts as differences, opened, audited and merged."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.checkpoints import is_adapter, local_path, open_adapter, open_checkpoint
from adamerge.checkpoints.renaming import under_names_of
from adamerge.compression import is_compressed, open_compressed
from adamerge.errors import AdamergeWarning, InputError, nearest, shortlist
from adamerge.models.last_layers import LastLayers, find_last_layers, folder_of, labelled_tensors
from adamerge.models.transformers_names import module_names, under_library_names
from adamerge.ranges import checked
from adamerge.state import State, audit, matches, tied_names
from adamerge.vectors.block import Block, Codec, Merge
from adamerge.vectors.dense import CODEC_DTYPES, DenseCodec
from adamerge.vectors.low_rank import LowRankCodec
from adamerge.vectors.origins import Origins
from adamerge.vectors.sparse import BernoulliCodec, MagnitudeCodec
from adamerge.vectors.stacks import Edit, Stacks, edited
from adamerge.vectors.streamed import StreamedBlock
from adamerge.vectors.ternary import TernaryCodec

Source = str | Path | State
STREAM = "stream"
CODECS: Mapping[str, Callable[[], Codec]] = {
    "ternary": TernaryCodec,
    "low_rank": LowRankCodec,
    "magnitude": MagnitudeCodec,
    "bernoulli": BernoulliCodec,
} | {name: partial(DenseCodec, dtype) for name, dtype in CODEC_DTYPES.items()}


@dataclass(frozen=True)
class TaskVectors:
    """A base and one stored difference per task and parameter.

    Attributes:
        tasks: Task names, in the order given.
        blocks: Parameter name to block, in sorted order of names.
        rest: Tensors that no merge changes: integers, and tensors that no expert has.
        codec: The stored form; None: nothing is stored, every use reads the files again.
        origins: What is known of the experts by reading them.
        aliases: Further names of tensors that several names share, such as tied embeddings.
        digests: SHA-256 of the base and of each expert, for reports; filled by `open`.
        layers: Last layers of classifiers, where base and experts were given as paths.
    """

    tasks: tuple[str, ...]
    blocks: Mapping[str, Block]
    rest: Mapping[str, Tensor]
    codec: Codec | None
    origins: Origins = field(default_factory=lambda: Origins({}, {}))
    aliases: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    layers: LastLayers = field(default_factory=LastLayers)

    @classmethod
    def open(
        cls,
        base: Source,
        experts: Mapping[str, Source],
        codec: str | Codec = "fp32",
        *,
        allow_missing: Sequence[str] = (),
        exclude: Sequence[str] = (),
        names: Collection[str] | None = None,
        merge_classifier: bool = False,
        force: bool = False,
    ) -> "TaskVectors":
        """Read a base and its experts, subtract in fp32, and store the differences.

        Peak memory is what the codec keeps plus one tensor per expert.

        Args:
            base: Checkpoint path, hub id, or a state in memory.
            experts: Task name to checkpoint path, hub id or state.
            codec: "fp32", "bf16", "fp16", "ternary" (two bits an entry, ComPEFT), "low_rank", "magnitude"
                or "bernoulli" (a tenth of a matrix), a codec object, or "stream": nothing is stored, and
                every use reads the files again.
            allow_missing: Patterns of tensor names that experts may lack; the base's values stand.
            exclude: Patterns of tensor names that stay the base's, whatever the experts hold.
            names: Only these tensors take part; the others stay the base's. Default: all.
            merge_classifier: Merge the last layers of classifiers although their rows cannot be shown to
                mean the same: otherwise they stay the base's, with a warning, unless the configurations of
                base and experts name the same classes in the same order.
            force: Accept experts that look as if they came from another base.

        Raises:
            InputError: The experts do not fit the base (one message lists all that is wrong), a value
                is not finite, or no expert differs from the base. Under "stream", values are looked at
                when they are first read, and ``origins.check()`` tells the last of these afterwards.
        """
        if not experts:
            raise InputError("no experts were given.", "Pass experts={NAME: PATH, ...}.")
        base_state = open_base(base, "base")
        last = base_last_layers(base, base_state)
        expert_states = {t: open_expert(e, f"expert {t!r}", base_state, last) for t, e in experts.items()}
        layers = LastLayers() if merge_classifier else last_layers(base, base_state, experts, expert_states)
        kept_layers = [name for name in layers.kept if not matches(name, exclude)]
        if kept_layers:
            warnings.warn(f"{layers.told} {layers.hint}", AdamergeWarning, stacklevel=2)
            exclude = (*exclude, *map(escape, kept_layers))
        audited = audit(
            base_state, expert_states, allow_missing=allow_missing, exclude=exclude, required=names or ()
        )
        if names is None:
            _warn_of_heads(base_state, expert_states, [*allow_missing, *exclude])
        kept = [name for name in audited if names is None or name in names]
        if not kept:
            raise InputError(
                "no tensor is left to merge.", "Look at the exclusions, and at the experts' names."
            )
        tied = tied_names(base_state, expert_states)
        aliases = {alias: name for alias, name in tied.items() if {alias, name} <= set(kept)}
        origins = Origins(base_state, expert_states, force)
        blocks = {name: StreamedBlock(name, origins) for name in kept if name not in aliases}
        rest = {name: base_state[name] for name in base_state if name not in kept}
        form = make_codec(codec)
        vectors = cls(tuple(experts), blocks, rest, None, origins, aliases, layers=layers)
        return vectors if form is None else vectors.stored(form)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that take part in the merge, in sorted order."""
        return tuple(self.blocks)

    @property
    def n_bytes(self) -> int:
        """Bytes of the base tensors and stored vectors that take part in the merge."""
        return sum(block.n_bytes for block in self.blocks.values())

    def merge(
        self, coefficients: Float[Tensor, "task tensor"], names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Give base + sum over tasks of coefficient x vector, differentiable in the coefficients.

        Args:
            coefficients: One per task and tensor, in the order of `tasks` and `names`.
            names: Merge only these tensors; default: all.

        Returns:
            Merged tensors in fp32, without the `rest`.
        """
        kept = self.names if names is None else tuple(n for n in self.names if n in set(names))
        if len(kept) < len(self.blocks):
            index = {name: i for i, name in enumerate(self.names)}
            coefficients = coefficients[:, [index[name] for name in kept]]
        with torch.autocast(coefficients.device.type, enabled=False):
            merged = Merge.apply(coefficients, [self.blocks[name] for name in kept])
        return self.with_aliases(dict(zip(kept, merged, strict=True)))

    def uniform(self, value: float | Sequence[float]) -> Float[Tensor, "task tensor"]:
        """Give coefficients that are equal for all tensors: one value, or one per task."""
        column = torch.as_tensor(value, dtype=torch.float32).expand(len(self.tasks))
        return column[:, None].expand(-1, len(self.blocks))

    def one_hot(self, task: str) -> Float[Tensor, "task tensor"]:
        """Give the coefficients under which the merged model is one task's expert."""
        return self.uniform([float(name == task) for name in self.tasks])

    def state(self, coefficients: Float[Tensor, "task tensor"]) -> dict[str, Tensor]:
        """Give the complete merged model on the CPU: merged tensors in fp32, and the rest as it is."""
        with torch.no_grad():
            merged = self.merge(coefficients.detach())
        return {n: t.cpu() for n, t in merged.items()} | dict(self.rest)

    def base_state(self) -> dict[str, Tensor]:
        """Give the complete base model in its source dtypes."""
        return self.with_aliases({n: b.base_tensor() for n, b in self.blocks.items()}) | dict(self.rest)

    def with_aliases(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the further names of tied tensors."""
        return dict(tensors) | {a: tensors[name] for a, name in self.aliases.items() if name in tensors}

    def stacks(self, description: str = "Reading task vectors") -> Stacks:
        """Give the fp32 vectors parameter by parameter, for static methods and edits."""
        return Stacks(self.blocks, description)

    def edit(self, function: Edit, *, entrywise: bool = False) -> "TaskVectors":
        """Apply a task-vector edit (trim, drop, mask) and give vectors again, in the same codec.

        Args:
            function: From a parameter's name and its fp32 ``[task, *param]`` vectors to edited ones.
            entrywise: Whether every entry is treated on its own.
        """
        blocks = edited(self.blocks, function, entrywise=entrywise)
        if self.codec is None:
            return replace(self, blocks=blocks)
        stored = {
            name: _encode(self.codec, name, block.base_tensor(), block.dense())
            for name, block in Stacks(blocks).walk()
        }
        return replace(self, blocks=stored)

    def stored(self, codec: str | Codec) -> "TaskVectors":
        """Read all that was not stored yet, check it as `open` does, hash the files, and store it.

        Args:
            codec: As in `open`; under "stream" all is read, checked and hashed, and nothing stored.

        Raises:
            InputError: As in `open`.
        """
        vectors, form = self, make_codec(codec)
        if form is not None:
            vectors = replace(self, codec=form).edit(lambda _, stack: stack, entrywise=True)
        elif len(self.origins.base_norms) < len(self.blocks):
            for _, block in self.stacks("Checking the experts").walk():
                block.combine(torch.zeros(len(self.tasks)))
        self.origins.check()
        return replace(vectors, digests=self.origins.digests())

    def to(self, device: torch.device | str) -> "TaskVectors":
        """Give the vectors on a device."""
        device = torch.device(device)
        return replace(self, blocks={n: b.to(device) for n, b in self.blocks.items()})


def make_codec(codec: str | Codec, options: Mapping[str, Any] | None = None) -> Codec | None:
    """Make a codec from its name and options; None for "stream", which stores nothing.

    Raises:
        InputError: The codec or an option is unknown, or a value is out of range.
    """
    if not isinstance(codec, str):
        return codec
    if codec == STREAM and not options:
        return None
    if codec not in CODECS:
        raise InputError(f"codec {codec!r} is unknown.", nearest(codec, [*CODECS, STREAM]))
    known = signature(CODECS[codec]).parameters if codec not in CODEC_DTYPES else ()
    for option in options or ():
        if option not in known:
            raise InputError(f"codec {codec!r} has no option {option!r}.", nearest(option, known))
    return checked(CODECS[codec])(**(options or {}))


def open_base(source: Source, role: str = "base") -> State:
    """Open a base: a checkpoint path, a hub id, or a state in memory."""
    return open_checkpoint(source, role=role) if isinstance(source, str | Path) else source


def base_last_layers(source: Source, base: State) -> tuple[str, ...]:
    """Return the names of a base's tensors whose rows are classes; none of a state in memory."""
    path = _path_of(source, "base")
    folder = path and folder_of(path)
    return () if folder is None else labelled_tensors(folder, base)


def last_layers(
    base: Source, state: State, experts: Mapping[str, Source], states: Mapping[str, State]
) -> LastLayers:
    """Find the last layers of classifiers among what was opened, and compare what their rows mean.

    Args:
        base: Where the base came from.
        state: The base.
        experts: Where the experts came from, by task.
        states: Those experts that could be opened.
    """
    if not isinstance(base, str | Path) and not any(isinstance(e, str | Path) for e in experts.values()):
        return LastLayers()
    opened = {t: (_path_of(experts[t], f"expert {t!r}"), [*expert]) for t, expert in states.items()}
    return find_last_layers(_path_of(base, "base"), state, opened)


def _path_of(source: Source, role: str) -> Path | None:
    return local_path(source, role) if isinstance(source, str | Path) else None


def open_expert(source: Source, role: str, base: State, rows: Collection[str] = ()) -> State:
    """Open an expert under the base's names: what `open_base` opens, a PEFT folder, or a compressed file.

    Args:
        source: The expert.
        role: Who this is ("expert 'cars'"), for error messages.
        base: The base's state.
        rows: Names of the base's tensors whose rows are classes: adapters may hold others of these.
    """
    if not isinstance(source, str | Path):
        return source
    path = local_path(source, role)
    if is_adapter(path):
        return open_adapter(path, base, role=role, modules=partial(module_names, base))
    if is_compressed(path):
        return open_compressed(path, base, role=role)
    return under_library_names(base, under_names_of(base, open_checkpoint(path, role=role), role))


def _warn_of_heads(base: State, experts: Mapping[str, State], patterns: Sequence[str]) -> None:
    """Warn of modules that only the base or only an expert has, unless the user has named them."""
    for task, expert in experts.items():
        lone = sorted(n for n in getattr(expert, "outside", ()) if not matches(n, patterns))
        left = [name for name in lone if name not in base]
        kept = [name for name in lone if name in base]
        if left:
            said = f"expert {task!r} has {shortlist(left)}, which the base lacks: left out."
            warnings.warn(said, AdamergeWarning, stacklevel=3)
        if kept:
            said = f"expert {task!r} has no {shortlist(kept)}: the base's values stand."
            warnings.warn(said, AdamergeWarning, stacklevel=3)


def _encode(codec: Codec, name: str, base: Tensor, vectors: Tensor) -> Block:
    try:
        return codec.encode(base, vectors)
    except OverflowError as error:
        raise InputError(
            f"codec {codec.name!r} cannot hold {name}: {error}.", "Use codec='bf16' or 'fp32'."
        ) from error
