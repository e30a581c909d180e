"""TaskVectors: a base and its experts as differences, opened, audited and merged."""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.checkpoints import Checkpoint, open_checkpoint
from adamerge.errors import AdamergeWarning, InputError, nearest
from adamerge.progress import track
from adamerge.state import State, audit, digest, first_nonfinite
from adamerge.vectors.block import Block, Codec, Merge
from adamerge.vectors.dense import CODEC_DTYPES, DenseCodec

Source = str | Path | State


class Stacks(Iterable[tuple[str, Tensor]]):
    """The fp32 task vectors of every parameter, ``(name, [task, *param])``; can be walked repeatedly."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, block in self._blocks.items():
            yield name, block.dense()


Edit = Callable[..., Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class TaskVectors:
    """A base and one stored difference per task and parameter.

    Attributes:
        tasks: Task names, in the order given.
        blocks: Parameter name to block, in sorted order of names.
        rest: Tensors that no merge changes: integers, and tensors that no expert has.
        codec: The stored form.
        digests: SHA-256 of the base and of each expert, for reports; filled by `open`.
    """

    tasks: tuple[str, ...]
    blocks: Mapping[str, Block]
    rest: Mapping[str, Tensor]
    codec: Codec
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        base: Source,
        experts: Mapping[str, Source],
        codec: str | Codec = "fp32",
        *,
        allow_missing: Sequence[str] = (),
        names: Collection[str] | None = None,
        force: bool = False,
    ) -> "TaskVectors":
        """Read a base and its experts, subtract in fp32, and store the differences.

        Peak memory is what the codec keeps plus one tensor per expert.

        Args:
            base: Checkpoint path, hub id, or a state in memory.
            experts: Task name to checkpoint path, hub id or state.
            codec: "fp32", "bf16", "fp16", or a codec object.
            allow_missing: Patterns of tensor names that experts may lack; the base's values stand.
            names: Only these tensors take part; the others stay the base's. Default: all.
            force: Accept experts that look as if they came from another base.

        Raises:
            InputError: The experts do not fit the base (one message lists all that is wrong), a value
                is not finite, or no expert differs from the base.
        """
        codec = _codec(codec)
        if not experts:
            raise InputError("no experts were given.", "Pass experts={NAME: PATH, ...}.")
        base_state = _state(base, "base")
        expert_states = {task: _state(e, f"expert {task!r}") for task, e in experts.items()}
        audited = audit(base_state, expert_states, allow_missing=allow_missing)
        kept = [name for name in audited if names is None or name in names]
        norms = _Norms(tuple(experts))
        blocks = {}
        for name in track(kept, "Reading task vectors"):
            tensor, vectors = _subtract(name, base_state, expert_states)
            norms.add(tensor, vectors)
            blocks[name] = _encode(codec, name, tensor, vectors)
        norms.check(force=force)
        rest = {name: base_state[name] for name in base_state if name not in blocks}
        digests = {"base": _digest(base_state)}
        digests |= {task: _digest(state) for task, state in expert_states.items()}
        return cls(tuple(experts), blocks, rest, codec, digests)

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
        return dict(zip(kept, merged, strict=True))

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
        return {n: b.base_tensor() for n, b in self.blocks.items()} | dict(self.rest)

    def stacks(self) -> Stacks:
        """Give the fp32 vectors parameter by parameter, for static methods and edits."""
        return Stacks(self.blocks)

    def edit(self, function: Edit, **options: object) -> "TaskVectors":
        """Apply a task-vector edit (trim, drop, mask) and give vectors again, in the same codec.

        Args:
            function: From `Stacks` to edited ``(name, [task, *param])`` pairs.
            options: Keyword options of the edit.
        """
        blocks = {
            name: _encode(self.codec, name, self.blocks[name].base_tensor(), stack)
            for name, stack in function(self.stacks(), **options)
        }
        return replace(self, blocks=blocks)

    def to(self, device: torch.device | str) -> "TaskVectors":
        """Give the vectors on a device."""
        device = torch.device(device)
        return replace(self, blocks={n: b.to(device) for n, b in self.blocks.items()})


def _codec(codec: str | Codec) -> Codec:
    if not isinstance(codec, str):
        return codec
    if codec not in CODEC_DTYPES:
        raise InputError(f"codec {codec!r} is unknown.", nearest(codec, CODEC_DTYPES))
    return DenseCodec(CODEC_DTYPES[codec])


def _state(source: Source, role: str) -> State:
    return open_checkpoint(source, role=role) if isinstance(source, str | Path) else source


def _digest(state: State) -> str:
    return state.file_digest() if isinstance(state, Checkpoint) else digest(state)


def _subtract(name: str, base: State, experts: Mapping[str, State]) -> tuple[Tensor, Tensor]:
    """Read one parameter everywhere and give the base tensor and the fp32 differences."""
    tensor = _finite(name, base[name], "base")
    wide = tensor.float()
    vectors = wide.new_zeros(len(experts), *wide.shape)
    for row, (task, expert) in zip(vectors, experts.items(), strict=True):
        if name in expert:
            torch.sub(_finite(name, expert[name], f"expert {task!r}").float(), wide, out=row)
    return tensor, vectors


def _finite(name: str, tensor: Tensor, role: str) -> Tensor:
    index = first_nonfinite(tensor)
    if index is not None:
        count = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{role}: {count} non-finite value(s) in {name}, first at {list(index)}.",
            "Its training diverged or its file is damaged: leave it out or save it again.",
        )
    return tensor.detach().cpu()


def _encode(codec: Codec, name: str, base: Tensor, vectors: Tensor) -> Block:
    try:
        return codec.encode(base, vectors)
    except OverflowError as error:
        raise InputError(
            f"codec {codec.name!r} cannot hold {name}: {error}.", "Use codec='bf16' or 'fp32'."
        ) from error


class _Norms:
    """Squared norms gathered while reading: they tell foreign, unchanged and, with sums, repeated experts."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        self.base = 0.0
        self.vectors: list[list[float]] = [[] for _ in tasks]
        self.sums: list[list[float]] = [[] for _ in tasks]

    def add(self, base: Tensor, vectors: Tensor) -> None:
        self.base += float(base.double().square().sum())
        for squares, sums, vector in zip(self.vectors, self.sums, vectors, strict=True):
            squares.append(float(vector.double().square().sum()))
            sums.append(float(vector.sum(dtype=torch.float64)))

    def check(self, *, force: bool) -> None:
        """Refuse foreign experts and all-zero vectors; warn of an unchanged or repeated expert."""
        ratios = {
            task: math.sqrt(sum(squares) / self.base) if self.base else 0.0
            for task, squares in zip(self.tasks, self.vectors, strict=True)
        }
        foreign = {task: ratio for task, ratio in ratios.items() if ratio > 1}
        if foreign and not force:
            found = ", ".join(f"{task!r} {ratio:.3g}" for task, ratio in ratios.items())
            raise InputError(
                f"experts {sorted(foreign)} are farther from the base than the base is long; "
                f"norm of task vector / norm of base: {found}.",
                "They look fine-tuned from another base. To merge them: force=True (--model.force true).",
            )
        unchanged = [t for t, squares in zip(self.tasks, self.vectors, strict=True) if not sum(squares)]
        if len(unchanged) == len(self.tasks):
            raise InputError("no expert differs from the base.", "Are these the fine-tuned files?")
        for task in unchanged:
            warnings.warn(f"expert {task!r} equals the base.", AdamergeWarning, stacklevel=3)
        known = zip(self.tasks, zip(self.vectors, self.sums, strict=True), strict=True)
        for (a, first), (b, second) in combinations(known, 2):
            if first == second and a not in unchanged:
                warnings.warn(f"experts {a!r} and {b!r} are equal.", AdamergeWarning, stacklevel=3)
