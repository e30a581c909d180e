"""A table of methods on one benchmark: each row computed once, resumable, all written together."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge import provenance
from adamerge.atomic import write_text
from adamerge.benchmarks import gate
from adamerge.benchmarks.files import configs, dump, no_benchmark, parts_of, read_document
from adamerge.benchmarks.measuring import expert_statistics
from adamerge.data.module import MultiTaskData
from adamerge.errors import InputError, nearest
from adamerge.evaluation import Evaluation, evaluate
from adamerge.fitting import open_vectors, run, weight_digests
from adamerge.models import Backbone, Head, Statistics, open_heads, walk
from adamerge.plots import accuracy_bars, bytes_curve, save_picture
from adamerge.progress import console
from adamerge.results import ResultRow, make_row, print_table, read_row, write_row, write_table
from adamerge.state import State
from adamerge.static import EDITS, METHODS, edit, expert_tensors, merge
from adamerge.vectors import TaskVectors

_INDIVIDUAL = "individual"
_BOUNDS = ("zero_shot", _INDIVIDUAL)
_BARE = ("--evaluate_experts", "false", "--evaluate_baselines", "false")  # they are rows of their own
_RESUME, _ANEW = ("--ckpt_path", "last"), ("--overwrite", "true")


class Benchmark:
    """Runs methods on one benchmark.

    Args:
        config: The benchmark's YAML file, or what one holds: model.base, model.experts, data.tasks and,
            if wanted, ``gate``: the accuracy in percent that each expert must reach, by task.
        out: Folder of the table; each method has a run folder under ``out/methods``.
        premises: What must hold before anything is merged; default: the configuration's ``gate``.
        settings: Of the images, in the place of the configuration's own: batch_size, holdout, ...

    Raises:
        InputError: The configuration is no benchmark.
    """

    def __init__(
        self,
        config: Path | Mapping[str, Any],
        out: Path,
        premises: gate.Premises | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        document = read_document(config) if isinstance(config, Path) else dict(config)
        if settings:
            document["data"] = {**document.get("data", {}), **settings}
        accuracy = document.pop("gate", None) or {}
        self.text = dump(document)
        self.config, self.out = out / "benchmark.yaml", out
        model, data = parts_of(document, config, "model", "data")
        try:
            self.base: str = model["base"]
            self.experts: dict[str, str] = model["experts"]
            self.data = MultiTaskData(data.pop("tasks"), **data)
            self.premises = premises or gate.Premises({t: float(v) for t, v in accuracy.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise no_benchmark(config, error) from error
        self.codec: str = model.get("codec", "fp32")
        self.unseen = [task for task in self.data.tasks if task not in self.experts]
        self.waived: list[str] = []
        self._individual: Mapping[str, float] | None = None
        gate.require_known(accuracy, self.data.tasks)

    def run(
        self, methods: Sequence[str], extra: Mapping[str, Sequence[str]] | None = None
    ) -> list[ResultRow]:
        """Let the experts pass the gate, then compute all rows; those that an earlier run finished are read.

        Args:
            methods: Names: "zero_shot", "individual", a static method, or a file of configs/methods.
            extra: More command line arguments of adaptive methods, by name.

        Returns:
            The rows, with normalised means.

        Raises:
            InputError: A method is unknown, or an expert, the activation or the preprocessing is not what
                the benchmark needs.
            DataError: Test images are not the benchmark's.
        """
        for method in methods:
            if not _is_static(method):
                self._method_file(method)  # refuses what is unknown before any work
        write_text(self.config, self.text)
        self.pass_gate()
        rows = [self._row(method, (extra or {}).get(method, ())) for method in methods]
        return [self._complete(row) for row in rows]

    def pass_gate(self) -> None:
        """Check the premises: first model and images, then every expert with its own head."""
        premises = self.premises
        gate.require_known(premises.waived, self.data.tasks)
        if not (premises.accuracy or premises.images):
            return
        found = gate.check_backbone(premises, self._backbone) + gate.check_images(premises, self.data)
        self.waived = gate.judge(found, premises)
        if premises.accuracy:
            found = gate.check_accuracy(premises, self._row(_INDIVIDUAL).accuracy)
            self.waived += gate.judge(found, premises)

    def write(self, rows: Sequence[ResultRow], title: str) -> None:
        """Write and print the table, and draw the bars."""
        write_table(self.out, rows)
        save_picture(self.out / "accuracy.png", lambda: accuracy_bars(rows))
        if sum(bool(row.details.get("stored")) for row in rows) > 1:
            save_picture(self.out / "accuracy_bytes.png", lambda: bytes_curve(rows))
        print_table(rows, title)

    def folder(self, method: str) -> Path:
        """Give the run folder of a method."""
        return self.out / "methods" / method

    def _row(self, method: str, extra: Sequence[str] = ()) -> ResultRow:
        """Read a finished row, or compute it; a row of other inputs or options counts as none."""
        folder, stamp = self.folder(method), self.out / "methods" / f"{method}.stamp"
        is_static = _is_static(method)
        current = self._stamp(method, extra)
        is_ours = stamp.exists() and stamp.read_text(encoding="utf-8") == current
        last_file = folder / ("result.json" if is_static else provenance.MANIFEST)
        if is_ours and last_file.exists():
            console.print(f"{method}: done before")
            return self._read_row(method)
        write_text(stamp, current)
        if is_static:
            write_row(folder / "result.json", self._static_row(method))
            console.print(f"{method}: done")
        else:
            can_resume = is_ours and (folder / "checkpoints" / "last.ckpt").exists()
            self._adapt(method, [*(_RESUME if can_resume else _ANEW), *extra])
        return self._read_row(method)

    def _read_row(self, method: str) -> ResultRow:
        row = read_row(self.folder(method) / "result.json")
        if method == _INDIVIDUAL:
            self._individual = row.accuracy
        return row

    def _adapt(self, method: str, more: Sequence[str]) -> None:
        """Run `adamerge fit`."""
        files = ["--config", str(self.config), "--config", str(self._method_file(method))]
        run(["fit", *files, "--run_dir", str(self.folder(method)), *_BARE, *more])

    def _method_file(self, method: str) -> Path:
        known = {path.stem: path for path in (configs() / "methods").glob("*.yaml")}
        if method not in known:
            raise InputError(f"method {method!r} is unknown.", nearest(method, [*known, *METHODS, *_BOUNDS]))
        return known[method]

    def _stamp(self, method: str, extra: Sequence[str]) -> str:
        """Tell, as text, all that a row depends on."""
        parts = [self.text, json.dumps(provenance.code_version()), json.dumps(self._digests)]
        parts += [] if _is_static(method) else [self._method_file(method).read_text(encoding="utf-8"), *extra]
        return "\n".join(parts)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return weight_digests(self.base, self.experts)

    def _complete(self, row: ResultRow) -> ResultRow:
        """Give a row's means, now that unseen tasks and the experts' accuracies are known."""
        means = make_row(row.method, row.accuracy, self._individual, unseen=self.unseen)
        kept = ("mean", "normalized_mean", "unseen", "unseen_mean")
        return replace(row, **{name: getattr(means, name) for name in kept})

    def _static_row(self, method: str) -> ResultRow:
        found = self._static(method)
        measured = method in METHODS and METHODS[method].statistics
        counts = self.data.transductive() if measured else {}
        return make_row(
            method,
            found.known,
            unknown=found.unknown,
            unseen=self.unseen,
            transductive=[task for task, count in counts.items() if count],
            provenance={
                "code": provenance.code_version(),
                "weights": self._digests,
                "data": {f"{task} test": _digest(self.data, task) for task in self.data.tested_tasks},
            },
        )

    @torch.no_grad()
    def _static(self, method: str) -> Evaluation:
        """Evaluate one merged model, or one model per task where the method knows the task."""
        if method in METHODS or method == "zero_shot":
            weights = self._read(self._merged(method))
            return self._evaluate(lambda _: weights)
        if method == _INDIVIDUAL:
            hot = self._vectors.one_hot
            return self._evaluate(lambda task: self._read(self._vectors.state(hot(task))), told=True)
        edited = edit(self._vectors, method)
        return self._evaluate(lambda task: self._read(dict(expert_tensors(edited, task))), told=True)

    def _evaluate(self, weights_of: Callable[[str], State], *, told: bool = False) -> Evaluation:
        weights_of = lru_cache(maxsize=1)(weights_of)
        device = _device()
        self._backbone.to(device)

        def walk_test(function: Callable[[Tensor], Tensor], task: str) -> Tensor:
            return walk(function, self.data.loader(self.data.test(task)))

        def features(batch: Tensor, task: str) -> tuple[Tensor, None]:
            return self._backbone.features(weights_of(task), batch.to(device)), None

        with_expert = [task for task in self.data.tested_tasks if task in self.experts]
        tasks = with_expert if told else None
        return evaluate(features, self._heads, self.data, walk_test, told=told, tasks=tasks)

    def _read(self, state: State) -> State:
        """Give what the backbone reads, in fp32, where it computes."""
        return {name: state[name].float().to(_device()) for name in self._backbone.names}

    def _merged(self, method: str) -> State:
        if method == "zero_shot":
            return self._vectors.base_state()
        more = {"statistics": self._statistics} if METHODS[method].statistics else {}
        return merge(self._vectors, method, **more)

    @cached_property
    def _statistics(self) -> Statistics:
        """Statistics of the experts on the unlabelled adaptation images."""
        opened = self._vectors, self._backbone, self._heads, self.data
        return expert_statistics(*opened, self._digests, cache=self.out / "statistics", device=_device())

    @cached_property
    def _opened(self) -> tuple[TaskVectors, Backbone]:
        vectors, backbone = open_vectors(self.base, self.experts, codec=self.codec)
        self.data.use(backbone)
        return vectors, backbone

    @property
    def _vectors(self) -> TaskVectors:
        return self._opened[0]

    @property
    def _backbone(self) -> Backbone:
        return self._opened[1]

    @cached_property
    def _heads(self) -> dict[str, Head]:
        return open_heads(self.base, self.data.tasks, self.experts)


def _device() -> torch.device:
    """Where static rows are evaluated; rows that learn have the trainer's device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _digest(data: MultiTaskData, task: str) -> str:
    return hashlib.sha256(b"".join(data.test(task).digests())).hexdigest()


def _is_static(method: str) -> bool:
    return method in (*_BOUNDS, *METHODS, *oracles())


def oracles() -> list[str]:
    """Name the edits that give one model per task."""
    return [name for name, row in EDITS.items() if row.oracle]
