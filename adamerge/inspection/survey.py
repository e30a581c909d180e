"""Looks at a base and its experts as a merge would, and reports what a merge would refuse."""

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path

from adamerge.checkpoints import Adapter
from adamerge.checkpoints.configs import DifferenceError
from adamerge.checkpoints.foreign_code import code_notes
from adamerge.errors import InputError, shortlist
from adamerge.inspection.checks import (
    audit_problems,
    describe_all,
    dtype_of,
    misfits,
    nonfinite_of,
    nonfinite_problems,
    one_line,
    text_of,
)
from adamerge.inspection.report import Kept, ModelFacts, Report
from adamerge.inspection.walk import Walk, comparable
from adamerge.models.hf_encoder import HFEncoder, headless_base
from adamerge.models.last_layers import LastLayers
from adamerge.models.opening import require_same_function
from adamerge.names import require_file_names
from adamerge.state import State, info, is_mergeable, matches
from adamerge.vectors import TaskVectors
from adamerge.vectors.store import Source, base_last_layers, last_layers, open_base, open_expert

_BATCH_NORM = ("running_mean", "running_var")


def inspect(
    base: Source,
    experts: Mapping[str, Source],
    *,
    allow_missing: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rank: bool = True,
    force: bool = False,
) -> Report:
    """Look at a base and its experts; one parameter is in memory at a time.

    Args:
        base: Checkpoint path, hub id, or a state in memory.
        experts: Task name to checkpoint path, PEFT LoRA folder, hub id or state.
        allow_missing: Patterns of tensor names that experts may lack.
        exclude: Patterns of tensor names that stay the base's.
        rank: Whether to measure the ranks of all matrices, which costs far more than everything else.
        force: Whether what a merge accepts by force is a note rather than a problem.

    Raises:
        InputError: The base cannot be read, or a task name cannot be a file name.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    require_file_names(experts)
    ours = open_base(base)
    headless = _headless(base, experts)
    if headless is not None:
        read = set(headless.names)
        allow_missing = (*allow_missing, *(escape(name) for name in ours if name not in read))
        exclude = (*exclude, *map(escape, headless.unmerged))
    states, problems = _open_all(experts, ours, base_last_layers(base, ours), headless)
    layers, contradictions = _last_layers(base, ours, experts, states)
    exclude = (*exclude, *map(escape, layers.kept))
    problems += contradictions
    patterns = {"allow_missing": allow_missing, "exclude": exclude}
    told = list(_configuration_problems(base, experts))
    forced = [line for line, may_be_forced in told if force and may_be_forced]
    problems += [line for line, _ in told if line not in forced]
    problems += audit_problems(ours, states, **patterns)
    rows = [r for role, s in {"base": ours, **states}.items() for r in misfits(role, ours, s, **patterns)]
    walk = Walk.of(comparable(ours, states, rows, exclude), rank=rank)
    walk.vectors.origins.force = force
    vectors, ratios = walk.vectors, walk.vectors.origins.ratios()
    return Report(
        tasks=vectors.tasks,
        problems=(*problems, *nonfinite_problems(walk.nonfinite), *_origin_problems(walk)),
        notes=(
            *(f"accepted by force: {line}" for line in forced),
            *_notes_of_classifiers(layers),
            *_notes(walk, states),
            *code_notes(_folders(base, experts)),
        ),
        base=_facts(base, ours),
        experts={task: _facts(experts[task], state) for task, state in states.items()},
        misfits=tuple(rows),
        nonfinite=tuple(walk.nonfinite),
        partial=_partial(vectors),
        kept=_kept(vectors, exclude),
        tied=dict(vectors.aliases),
        same_base={task: ratios[task] <= 1 for task in walk.compared},
        zero=walk.zero,
        repeated=walk.repeated,
        vectors=walk.geometry,
    )


def _folders(base: Source, experts: Mapping[str, Source]) -> dict[str, Path]:
    """Return the sources that are paths, by role."""
    return {r: Path(s) for r, s in {"base": base, **experts}.items() if isinstance(s, str | Path)}


def _headless(base: Source, experts: Mapping[str, Source]) -> HFEncoder | None:
    """Return the backbone of a base that lacks layers of its experts' classifiers, if all are in files."""
    folders = _folders(base, experts)
    if len(folders) <= len(experts):
        return None
    return headless_base(folders.pop("base"), folders)


def _open_all(
    experts: Mapping[str, Source], base: State, rows: Collection[str], headless: HFEncoder | None
) -> tuple[dict[str, State], list[str]]:
    """Open what can be opened, and say why the others cannot."""
    states: dict[str, State] = {}
    problems: list[str] = []
    for task, source in experts.items():
        try:
            if headless is not None:
                states[task] = headless.expert(Path(str(source)), f"expert {task!r}", base, open_expert)
            else:
                states[task] = open_expert(source, f"expert {task!r}", base, rows)
        except InputError as error:
            problems.append(one_line(error))
    if not states:
        raise InputError("\n".join(problems) or "no experts were given.", "Nothing is left to inspect.")
    return states, problems


def _configuration_problems(base: Source, experts: Mapping[str, Source]) -> Iterator[tuple[str, bool]]:
    """List where configurations beside the weights differ, and whether force accepts it."""
    for task, expert in experts.items():
        if isinstance(base, str | Path) and isinstance(expert, str | Path):
            try:
                require_same_function(Path(base), {task: Path(expert)})
            except InputError as error:
                yield one_line(error), isinstance(error, DifferenceError)


def _origin_problems(walk: Walk) -> list[str]:
    """Say what a merge says of experts of another base, and of experts that all equal the base."""
    if not walk.compared or len(walk.zero) == len(walk.compared) < len(walk.vectors.tasks):
        return []  # what was not compared may differ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of stands in the report
        try:
            walk.vectors.origins.check()
        except InputError as error:
            return [one_line(error)]
    return []


def _last_layers(
    base: Source, ours: State, experts: Mapping[str, Source], states: Mapping[str, State]
) -> tuple[LastLayers, list[str]]:
    """Find the last layers of classifiers, or say what is wrong with a configuration."""
    try:
        return last_layers(base, ours, experts, states), []
    except InputError as error:
        return LastLayers(), [one_line(error)]


def _notes_of_classifiers(layers: LastLayers) -> Iterator[str]:
    if layers.kept:
        yield layers.told
    elif layers.names:
        yield f"the classifiers' last layers are merged, their classes agree: {shortlist(layers.names)}."


def _notes(walk: Walk, states: Mapping[str, State]) -> Iterator[str]:
    vectors = walk.vectors
    for task, state in states.items():
        if dialect := getattr(state, "dialect", ""):
            yield f"expert {task!r}: its names are read {dialect}."
    yield from (f"expert {task!r} equals the base." for task in walk.zero)
    yield from (f"experts {a!r} and {b!r} are equal." for a, b in walk.repeated)
    statistics = [name for name in vectors.blocks if name.endswith(_BATCH_NORM)]
    if statistics:
        yield f"statistics of batch norms are merged like weights: {shortlist(statistics)}."
    rest = [row for name in vectors.rest for row in nonfinite_of(name, {"base": vectors.origins.base})]
    yield from (f"{problem} No merge changes them." for problem in nonfinite_problems(rest))


def _facts(source: Source, state: State) -> ModelFacts:
    infos = describe_all(state)
    ranks = [state.rank(name) for name in state.changed] if isinstance(state, Adapter) else []
    return ModelFacts(
        source=str(source) if isinstance(source, str | Path) else "memory",
        tensors=len(infos),
        parameters=sum(math.prod(found.shape) for found in infos.values() if found),
        dtypes=dict(Counter(dtype_of(found) for found in infos.values())),
        lora_ranks=dict(Counter(str(rank) for rank in ranks if rank)),
    )


def _partial(vectors: TaskVectors) -> dict[str, tuple[str, ...]]:
    """Give the merged tensors that only some experts have, and those experts."""
    experts = vectors.origins.experts
    holders = {name: tuple(t for t, state in experts.items() if name in state) for name in vectors.blocks}
    return {name: some for name, some in holders.items() if len(some) < len(experts)}


def _kept(vectors: TaskVectors, exclude: Sequence[str]) -> tuple[Kept, ...]:
    rows = []
    for name in vectors.rest:
        found = info(vectors.origins.base, name)
        reason = "excluded" if matches(name, exclude) else "no expert"
        rows.append(Kept(name, text_of(found), reason if is_mergeable(found.dtype) else "integer"))
    return tuple(rows)
