"""`adamerge evolve BENCHMARK`: evolutionary merging in data-flow space."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from adamerge import provenance
from adamerge.atomic import refuse_existing
from adamerge.benchmarks import Benchmark
from adamerge.benchmarks.opened import INDIVIDUAL
from adamerge.checkpoints import locate
from adamerge.commands.bench import benchmark_file
from adamerge.dataflow import (
    Fitness,
    Flow,
    FlowBackbone,
    Found,
    Genome,
    Step,
    find_blocks,
    flow_weights,
    search,
)
from adamerge.dataflow.searching import Method
from adamerge.errors import InputError, nearest
from adamerge.mixture import Mixture, save_mixture
from adamerge.objectives import Entropy, FeatureMatching, KLTeacher, Objective, Supervised
from adamerge.progress import console
from adamerge.ranges import Count, Range, Rate, Seed
from adamerge.results import ResultRow, make_row
from adamerge.state import State
from adamerge.static import METHODS
from adamerge.vectors import TaskVectors

Score = Literal["cross_entropy", "error_rate", "kl_teacher", "features", "entropy"]
_OBJECTIVES = {
    "kl_teacher": KLTeacher,
    "features": FeatureMatching,
    "entropy": Entropy,
}


def evolve(
    benchmark: str,
    *,
    out: str | None = None,
    start: str = "task_arithmetic",
    donors: list[str] | None = None,
    objective: Score = "cross_entropy",
    generations: Count = 20,
    population: Annotated[int, Range("[4, 1e6]")] | None = None,
    repeats: Annotated[int, Range("[1, 1000]")] = 2,
    scales: bool = True,
    sigma: Rate = 0.1,
    method: Method = "cmaes",
    seed: Seed = 0,
    data: dict[str, Any] | None = None,
) -> int:
    """Search which blocks of a merged model and of the experts run, in which order (arXiv:2403.13187).

    Weights stay as they are. Paths are judged on the adaptation images; the best of all must then beat
    model A, the merged model as it is, on the held-out adaptation images, or model A is kept. Test images
    are read for the table alone. An interrupted search goes on where it was.

    Args:
        benchmark: A YAML file of base, experts and tasks, or embedded.
        out: Folder of the search, the table and the model; default: runs/evolve/BENCHMARK.
        start: Model A: a static method, or zero_shot for the base.
        donors: Tasks whose experts lend blocks; default: all.
        objective: What is minimised: cross_entropy or error_rate, which read labels of the adaptation
            images; kl_teacher, features or entropy, which do not.
        generations: Generations of the search.
        population: Paths of a generation, 4 or more; default: 4 + floor(3 ln n) for n genes.
        repeats: How often all blocks are laid out.
        scales: Search a factor of the hidden state for each pair of blocks, too.
        sigma: Standard deviation of the first paths' genes.
        method: cmaes, or random to compare with.
        seed: Seed of the search.
        data: Settings of the images: --data.shots 16, --data.holdout 0.
    """
    folder = Path(out) if out else Path("runs") / "evolve" / Path(benchmark).stem
    table = Benchmark(benchmark_file(benchmark), folder, settings=data)
    if start not in (*METHODS, "zero_shot"):
        raise InputError(f"there is no static method {start!r}.", nearest(start, [*METHODS, "zero_shot"]))
    lent = _lent(donors, list(table.models.experts))
    scored = _OBJECTIVES[objective]() if objective in _OBJECTIVES else Supervised(objective)  # pyright: ignore[reportArgumentType]  # the names that are left are Supervised's
    with table.claimed():
        refuse_existing(folder / "merged", overwrite=True)  # before hours of search
        individual, first = table.run([INDIVIDUAL, start])
        task = _Opened(table, start, lent, scored)
        genome = Genome(1 + len(lent), task.count, repeats, scales)
        asked = {"start": start, "donors": lent, "objective": objective, "repeats": repeats, "scales": scales}
        asked |= {"sigma": sigma, "method": method, "seed": seed, "population": population}
        inputs = {
            "weights": table.models.digests,
            "data": table.data.fingerprint(labelled=scored.needs_labels),
            "config": asked,
        }
        judged = {name: digest for name, digest in inputs["data"].items() if not name.endswith(" test")}
        options: dict[str, Any] = {"method": method, "population": population, "sigma": sigma, "seed": seed}
        options |= {"state": folder / "search.pt", "inputs": [inputs["weights"], judged, asked, table.text]}
        options |= {"settings": table.models.settings}
        found = search(task.fitness(), task.blocks, genome, generations, **options)
        flow, notes, details = task.selected(found)
        evaluation = table.models.accuracy(lambda _: task.weights, backbone=FlowBackbone(task.backbone, flow))
        told: dict[str, Any] = {"unknown": evaluation.unknown, "notes": notes, "details": details}
        told["inputs"] = table.data.noun
        told["transductive"] = [name for name, count in table.data.transductive().items() if count]
        told["provenance"] = {"code": provenance.code_version(), **inputs, "generations": generations}
        name = f"evolved_{method}_{objective}"
        row = make_row(name, evaluation.known, individual.accuracy, unseen=table.unseen, **told)
        _write(table, task, flow, [individual, first, row])
    return 0


class _Opened:
    """Model A and the donors, opened, and how their paths are judged."""

    def __init__(self, table: Benchmark, start: str, donors: Sequence[str], objective: Objective) -> None:
        self.models, self.data, self.objective = table.models, table.data, objective
        states = [self.models.read(self.models.merged(start)), *map(self._expert, donors)]
        where = next(iter(states[0].values())).device
        self.backbone = self.models.backbone
        self.backbone.to(where)
        self.heads = {name: head.to(where) for name, head in self.models.heads.items()}
        image = self.data.adaptation(self.data.adapting_tasks[0]).part(torch.tensor([0])).images
        self.blocks = find_blocks(self.backbone, states[0], image.to(where))
        self.count = len([*self.backbone.module.get_submodule(self.blocks).children()])
        self.weights = flow_weights(self.backbone, self.blocks, states)

    def _expert(self, task: str) -> State:
        vectors = self.models.vectors
        return self.models.read(vectors.state(vectors.one_hot(task)))

    def fitness(self, *, held_out: bool = False) -> Fitness:
        """Judge paths on the adaptation images, or on those that are held out of them."""
        data, tasks, labels = self.data, self.data.adapting_tasks, None
        part = data.held_out if held_out else data.adaptation
        if self.objective.needs_labels:
            labels_of = data.held_out_labels if held_out else data.adaptation_labels
            labels = {task: labels_of(task) for task in tasks}
        images = {task: part(task).images for task in tasks}
        given = self.backbone, self.weights, self.heads, self.objective, images
        return Fitness(*given, expert=self._expert, labels=labels)

    def selected(self, found: Found) -> tuple[Flow, list[str], dict[str, Any]]:
        """Give the winner, or model A where held-out images do not prefer it; and what the row tells."""
        start = Flow(self.blocks, tuple(Step(0, block) for block in range(self.count)))
        fitness = self.fitness(held_out=True)
        before, after = fitness(start), fitness(found.flow)
        flow = found.flow if after < before else start
        notes = ["learned on labels of adaptation images"] if self.objective.needs_labels else []
        if flow is start:
            notes.append("the held-out images prefer model A as it is: it was kept")
        details = {"judged": found.judged, "history": found.history, "held_out": [before, after]}
        return flow, notes, details | {"flow": flow.document(), "winner": found.flow.document()}


def _lent(donors: list[str] | None, experts: list[str]) -> list[str]:
    """Read which experts lend blocks."""
    names = experts if donors is None else [name for item in donors for name in item.split(",") if name]
    for name in names:
        if name not in experts:
            raise InputError(f"there is no expert {name!r}.", nearest(name, experts))
    return names


def _write(table: Benchmark, task: _Opened, flow: Flow, rows: list[ResultRow]) -> None:
    """Write model and table."""
    row, models, cpu = rows[-1], table.models, torch.device("cpu")
    backbone = FlowBackbone(task.backbone, flow).to(cpu)
    weights = {name: task.weights[name].cpu() for name in backbone.names}
    heads = {name: head.to(cpu) for name, head in models.heads.items()}
    classes = {name: table.data.class_names(name) for name in table.data.tasks}
    mixture = Mixture(TaskVectors((), {}, weights, None), backbone, heads, None, classes)
    config = {"method": row.method, **row.provenance["config"]}
    sources = {"base": models.base, **models.experts}
    card = provenance.model_card(sources, models.digests, config, row, flow=True)
    more: dict[str, Any] = {"like": locate(models.base), "card": card, "provenance": row.provenance}
    save_mixture(mixture, table.out / "merged", **more, overwrite=True)
    table.write(rows, f"{table.out.name}: top-1 accuracy, %")
    console.print(f"Table and model are in {table.out}.")
