"""A table of methods on one benchmark: each row computed once, resumable, all written together."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from adamerge import provenance
from adamerge.atomic import atomic_folder, write_text
from adamerge.data.module import MultiTaskData
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError, nearest
from adamerge.evaluation import Evaluation, evaluate
from adamerge.fitting import locate, open_vectors, run, weight_digests
from adamerge.models import Head, OpenClipBackbone, Statistics, walk, zero_shot_heads
from adamerge.plots import accuracy_bars, bytes_curve, save_picture
from adamerge.progress import console
from adamerge.results import ResultRow, make_row, print_table, read_row, write_row, write_table
from adamerge.state import State
from adamerge.static import EDITS, METHODS, edit, expert_tensors, merge
from adamerge.vectors import TaskVectors

_BOUNDS = ("zero_shot", "individual")
_BARE = ("--evaluate_experts", "false", "--evaluate_baselines", "false")  # they are rows of their own
_RESUME, _ANEW = ("--ckpt_path", "last"), ("--overwrite", "true")


def configs() -> Path:
    """Folder of the configuration files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    return next(p for p in (package.parent / "configs", package / "configs") if p.is_dir())


class Benchmark:
    """Runs methods on one benchmark.

    Args:
        config: The benchmark's YAML file: base, experts and tasks.
        out: Folder of the table; each method has a run folder under ``out/methods``.
    """

    def __init__(self, config: Path, out: Path) -> None:
        self.config, self.out = config, out
        model, data = read_benchmark(config, "model", "data")
        try:
            self.base: str = model["base"]
            self.experts: dict[str, str] = model["experts"]
            self.data = MultiTaskData(data.pop("tasks"), **data)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{config} is no benchmark: {type(error).__name__} {error}.",
                "It needs model.base, model.experts and data.tasks; see configs/benchmarks/embedded.yaml.",
            ) from error

    def run(
        self, methods: Sequence[str], extra: Mapping[str, Sequence[str]] | None = None
    ) -> list[ResultRow]:
        """Compute all rows; those that an earlier run finished are read.

        Args:
            methods: Names: "zero_shot", "individual", a static method, or a file of configs/methods.
            extra: More command line arguments of adaptive methods, by name.

        Returns:
            The rows, with normalised means.
        """
        for method in methods:
            if not _is_static(method):
                self._method_file(method)  # refuses what is unknown before any work
        rows = [self._row(method, (extra or {}).get(method, ())) for method in methods]
        individual = next((row.accuracy for row in rows if row.method == "individual"), None)
        return [_normalized(row, individual) for row in rows]

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

    def _row(self, method: str, extra: Sequence[str]) -> ResultRow:
        """Read a finished row, or compute it; a row of other inputs or options counts as none."""
        folder, stamp = self.folder(method), self.out / "methods" / f"{method}.stamp"
        is_static = _is_static(method)
        current = self._stamp(method, extra)
        is_ours = stamp.exists() and stamp.read_text(encoding="utf-8") == current
        last_file = folder / ("result.json" if is_static else provenance.MANIFEST)
        if is_ours and last_file.exists():
            console.print(f"{method}: done before")
            return read_row(folder / "result.json")
        write_text(stamp, current)
        if is_static:
            found = self._static(method)
            code = {"code": provenance.code_version()}
            row = make_row(method, found.known, unknown=found.unknown, provenance=code)
            write_row(folder / "result.json", row)
            console.print(f"{method}: done")
        else:
            can_resume = is_ours and (folder / "checkpoints" / "last.ckpt").exists()
            self._adapt(method, [*(_RESUME if can_resume else _ANEW), *extra])
        return read_row(folder / "result.json")

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
        parts = [self.config.read_text(encoding="utf-8"), *extra, json.dumps(provenance.code_version())]
        parts += [json.dumps(self._digests)]
        parts += [] if _is_static(method) else [self._method_file(method).read_text(encoding="utf-8")]
        return "\n".join(parts)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return weight_digests(self.base, self.experts)

    @torch.no_grad()
    def _static(self, method: str) -> Evaluation:
        """Evaluate one merged model, or one model per task where the method knows the task."""
        if method in METHODS or method == "zero_shot":
            weights = self._read(self._merged(method))
            return self._evaluate(lambda _: weights)
        if method == "individual":
            hot = self._vectors.one_hot
            return self._evaluate(lambda task: self._read(self._vectors.state(hot(task))), told=True)
        edited = edit(self._vectors, method)
        return self._evaluate(lambda task: self._read(dict(expert_tensors(edited, task))), told=True)

    def _evaluate(self, weights_of: Callable[[str], State], *, told: bool = False) -> Evaluation:
        weights_of = lru_cache(maxsize=1)(weights_of)

        def walk_test(function: Callable[[Tensor], Tensor], task: str) -> Tensor:
            return walk(function, self.data.loader(self.data.test(task)))

        def features(batch: Tensor, task: str) -> tuple[Tensor, None]:
            return self._backbone.features(weights_of(task), batch), None

        return evaluate(features, self._heads, self.data, walk_test, told=told)

    def _read(self, state: State) -> State:
        """Give what the backbone reads, in fp32."""
        return {name: state[name].float() for name in self._backbone.names}

    def _merged(self, method: str) -> State:
        if method == "zero_shot":
            return self._vectors.base_state()
        more = {"statistics": self._statistics} if METHODS[method].statistics else {}
        return merge(self._vectors, method, **more)

    @cached_property
    def _statistics(self) -> Statistics:
        """Statistics of the experts on the unlabelled adaptation images."""
        opened = self._vectors, self._backbone, self._heads, self.data
        return expert_statistics(*opened, self._digests, cache=self.out / "statistics")

    @cached_property
    def _opened(self) -> tuple[TaskVectors, OpenClipBackbone]:
        vectors, backbone = open_vectors(self.base, self.experts)
        self.data.preprocess = backbone.preprocess
        return vectors, backbone

    @property
    def _vectors(self) -> TaskVectors:
        return self._opened[0]

    @property
    def _backbone(self) -> OpenClipBackbone:
        return self._opened[1]

    @cached_property
    def _heads(self) -> dict[str, Head]:
        return zero_shot_heads(locate(self.base), self.data.tasks)


def read_benchmark(config: Path, *parts: str) -> list[Any]:
    """Read parts of a benchmark's YAML file, such as "model" and "data"; tasks become rows.

    Raises:
        InputError: The file is no benchmark.
    """
    try:
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        found = [document[part] for part in parts]
        for part in found:
            if "tasks" in part:
                part["tasks"] = {name: TaskSpec(**row) for name, row in part["tasks"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"{config} is no benchmark: {type(error).__name__} {error}.",
            "It needs model.base, model.experts and data.tasks; see configs/benchmarks/embedded.yaml.",
        ) from error
    return found


def expert_statistics(
    vectors: TaskVectors,
    backbone: OpenClipBackbone,
    heads: Mapping[str, Head],
    data: MultiTaskData,
    digests: Mapping[str, str],
    **options: Any,
) -> Statistics:
    """Prepare statistics of the experts on the unlabelled adaptation images.

    Args:
        vectors: The experts.
        backbone: Features of any weights.
        heads: Every task's head.
        data: The images.
        digests: SHA-256 of base and experts.
        options: Those of `Statistics`, with its cache.
    """
    images = "/".join(data.fingerprint().values())
    return Statistics(
        backbone,
        heads,
        {task: data.adaptation(task).images for task in vectors.tasks},
        lambda task: vectors.state(vectors.one_hot(task)),
        keys={task: f"{digests['base']}/{digests[task]}/{images}" for task in vectors.tasks},
        **options,
    )


def _is_static(method: str) -> bool:
    return method in (*_BOUNDS, *METHODS, *oracles())


def oracles() -> list[str]:
    """Name the edits that give one model per task."""
    return [name for name, row in EDITS.items() if row.oracle]


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, replacing the old copy once the new one is complete."""
    with atomic_folder(target, overwrite=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _normalized(row: ResultRow, individual: Mapping[str, float] | None) -> ResultRow:
    mean = make_row(row.method, row.accuracy, individual).normalized_mean
    return replace(row, normalized_mean=mean)
