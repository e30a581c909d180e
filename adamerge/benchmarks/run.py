"""A table of methods on one benchmark: each row computed once, resumable, all written together."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from adamerge import ownership, provenance
from adamerge.atomic import write_text
from adamerge.benchmarks import gate
from adamerge.benchmarks.files import (
    dump,
    method_file,
    method_name,
    no_benchmark,
    parts_of,
    read_document,
)
from adamerge.benchmarks.opened import BOUNDS, INDIVIDUAL, Models, is_static, measures
from adamerge.data.module import MultiTaskData
from adamerge.documents import require_path
from adamerge.errors import AdamergeError, EnvironmentProblem, InputError, nearest, shortlist
from adamerge.fitting import LAST, check, class_names, own_classes, pending, run
from adamerge.plots import accuracy_bars, bytes_curve, save_picture
from adamerge.progress import console, print_line
from adamerge.results import ResultRow, doubts, make_row, print_table, read_row, write_row, write_table
from adamerge.shipped import as_argument, configs
from adamerge.static import METHODS

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
        force: Accept experts that look as if they came from another base, or whose settings differ.

    Raises:
        InputError: The configuration is no benchmark, or has adaptation images of a task without an expert.
    """

    def __init__(
        self,
        config: Path | Mapping[str, Any],
        out: Path,
        premises: gate.Premises | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> None:
        require_path("out", str(out))
        document = read_document(config) if isinstance(config, Path) else dict(config)
        _require_settings(settings or {})
        if settings:
            document["data"] = {**document.get("data", {}), **settings}
        if force and isinstance(document.get("model"), dict):
            document["model"] = {**document["model"], "force": True}
        accuracy = document.pop("gate", None) or {}
        self.document, self.text = document, dump(document)
        self._beside = [config] if isinstance(config, Path) else []
        self.config, self.out = out / "benchmark.yaml", out
        name = config if isinstance(config, Path) else "the given configuration"
        model, data = parts_of(document, name, "model", "data")
        try:
            base, experts, codec = model["base"], model["experts"], model.get("codec", "fp32")
            self.unseen = [task for task in data["tasks"] if task not in experts]
            self.data = MultiTaskData(data.pop("tasks"), **data)
            self.premises = premises or gate.Premises({t: float(v) for t, v in accuracy.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise no_benchmark(name, error) from error
        force = bool(model.get("force", False))
        self.models = Models(base, experts, codec, self.data, out / "statistics", force=force)
        self.waived: list[str] = []
        self.failures: dict[str, Exception] = {}
        self._individual: Mapping[str, float] | None = None
        gate.require_known(accuracy, self.data.tasks)
        self._refuse_adapting_unseen()

    def run(
        self,
        methods: Sequence[str],
        extra: Mapping[str, Sequence[str]] | None = None,
        *,
        keep_going: bool = False,
    ) -> list[ResultRow]:
        """Let the experts pass the gate, then compute all rows; those that an earlier run finished are read.

        Args:
            methods: Names: "zero_shot", "individual", a static method, or a file of configs/methods; or the
                path of a method file of one's own.
            extra: More command line arguments of adaptive methods, by what `methods` calls them.
            keep_going: Compute the other rows where one fails; `failures` then has its error.

        Returns:
            The rows that were computed, with normalised means.

        Raises:
            InputError: A method is unknown, or an expert, the activation or the preprocessing is not what
                the benchmark needs.
            DataError: Test images are not the benchmark's.
        """
        for method in methods:
            if not is_static(method):
                self._method_file(method)  # refuses what is unknown before any work
        if len({method_name(method) for method in methods}) < len(set(methods)):
            raise InputError("two methods have one name.", "Rename one of the files.")
        premises = self.premises
        gate.require_known([*premises.waived, *premises.accuracy, *premises.images], self.data.tasks)
        for method in methods:
            self._check_method(method, (extra or {}).get(method, ()))
        with self.claimed():
            write_text(self.config, self.text)
            self.pass_gate()
            arguments = {method: tuple((extra or {}).get(method, ())) for method in methods}
            for method in methods:  # what is wrong with models or images ends the table, not one row
                self._stamp(method, arguments[method])
            rows = [self._attempt(method, arguments[method], keep_going=keep_going) for method in methods]
        return [self._complete(row) for row in rows if row is not None]

    def _attempt(self, method: str, extra: Sequence[str], *, keep_going: bool) -> ResultRow | None:
        """Compute a row; where it fails and the others are to go on, keep its error and return None."""
        try:
            return self._row(method, extra)
        except EnvironmentProblem:
            raise  # no disk, no GPU: the other rows would fail alike
        except Exception as error:
            if not keep_going or os.environ.get("ADAMERGE_TRACEBACK"):
                raise
            name = method_name(method)
            self.failures[name] = error
            print_line(f"{name}: failed: {_message(error)}", style="red")
            return None

    def pass_gate(self) -> None:
        """Check the premises: first model and images, then every expert with its own head."""
        premises = self.premises
        gate.require_known([*premises.waived, *premises.accuracy, *premises.images], self.data.tasks)
        if not premises.are_stated:
            return
        found = gate.check_backbone(premises, self.models.backbone) + gate.check_images(premises, self.data)
        self.waived = gate.judge(found, premises)
        if premises.accuracy:
            found = gate.check_accuracy(premises, self._row(INDIVIDUAL).accuracy)
            self.waived += gate.judge(found, premises)

    def write(self, rows: Sequence[ResultRow], title: str) -> None:
        """Write and print the table, and draw the bars."""
        with self.claimed():
            write_table(self.out, rows)
            save_picture(self.out / "accuracy.png", lambda: accuracy_bars(rows))
            if sum(bool(row.details.get("stored")) for row in rows) > 1:
                save_picture(self.out / "accuracy_bytes.png", lambda: bytes_curve(rows))
        print_table(rows, title)

    def claimed(self) -> AbstractContextManager[object]:
        """Write to the table's folder within the block, as the only process."""
        return ownership.claimed(self.out, "table")

    def folder(self, method: str) -> Path:
        """Give the run folder of a method."""
        return self.out / "methods" / method_name(method)

    def _refuse_adapting_unseen(self) -> None:
        """Refuse to adapt on images of tasks that the table would call unseen."""
        found = [task for task in self.unseen if self.data.tasks[task].adapt]
        if found:
            raise InputError(
                f"tasks without an expert are unseen, and {shortlist(found)} would be adapted on.",
                "Remove data.tasks.TASK.adapt, or add the expert: model.experts.TASK.",
            )

    def _row(self, method: str, extra: Sequence[str] = ()) -> ResultRow:
        """Read a finished row, or compute it; a row of other inputs or options counts as none.

        Two stamps tell all that a row depends on: ``.stamp`` of the row that the folder holds, ``.begun`` of
        the one that is computed, beside it or in an empty folder.
        """
        folder, current = self.folder(method), self._stamp(method, extra)
        stamp, begun = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("stamp", "begun"))
        last_file = folder / ("result.json" if is_static(method) else provenance.MANIFEST)
        is_current = _read(stamp) == current
        if is_current and last_file.exists():
            console.print(f"{method}: done before")
            return self._read_row(method)
        is_begun = _read(begun) == current
        write_text(begun, current)
        if is_static(method):
            write_row(folder / "result.json", self._static_row(method))
            console.print(f"{method}: done")
        else:
            is_its_own = is_current or (is_begun and not stamp.exists())
            can_resume = (is_its_own and (folder / LAST).exists()) or (is_begun and pending(folder))
            self._adapt(method, [*(_RESUME if can_resume else _ANEW), *extra])
        write_text(stamp, current)
        begun.unlink()
        return self._read_row(method)

    def _read_row(self, method: str) -> ResultRow:
        row = read_row(self.folder(method) / "result.json")
        if method == INDIVIDUAL:
            self._individual = row.accuracy
        return row

    def _check_method(self, method: str, more: Sequence[str]) -> None:
        """Parse a method's file, and import the classes that it names, before any row is computed."""
        if not is_static(method):
            files = ["--config", as_argument(self.document), "--config", str(self._method_file(method))]
            with self._own_classes(method):
                check(["fit", *files, *more])

    def _own_classes(self, method: str) -> AbstractContextManager[None]:
        """Look for classes of one's own beside the benchmark's file and the method's."""
        return own_classes(["--config", str(self._method_file(method))], *self._beside)

    def _adapt(self, method: str, more: Sequence[str]) -> None:
        """Run `adamerge fit`."""
        files = ["--config", str(self.config), "--config", str(self._method_file(method))]
        named = ["--run_dir", str(self.folder(method)), "--method", method_name(method)]
        with self._own_classes(method):
            run(["fit", *files, *named, *_BARE, *more], is_row=True)

    def _method_file(self, method: str) -> Path:
        found = method_file(method)
        if found is None:
            known = [path.stem for path in (configs() / "methods").glob("*.yaml")]
            raise InputError(f"method {method!r} is unknown.", nearest(method, [*known, *METHODS, *BOUNDS]))
        return found

    def _stamp(self, method: str, extra: Sequence[str]) -> str:
        """Tell, as text, all that a row depends on."""
        inputs = [provenance.code_version(), self.models.digests, self.models.inputs(method)]
        inputs += [self.models.settings, class_names(self.data.tasks)]
        parts = [self.text, *map(json.dumps, inputs)]
        if not is_static(method):
            parts += [self._method_file(method).read_text(encoding="utf-8")]
            parts += [word.replace(str(self.out), "") for word in extra]  # wherever the table lies
        return "\n".join(parts)

    def _complete(self, row: ResultRow) -> ResultRow:
        """Give a row's means, now that unseen tasks and the experts' accuracies are known."""
        means = make_row(row.method, row.accuracy, self._individual, unseen=self.unseen)
        kept = ("mean", "normalized_mean", "unseen", "unseen_mean")
        row = replace(row, **{name: getattr(means, name) for name in kept})
        return replace(row, notes=[*row.notes, *doubts({}, {}, row)])

    def _static_row(self, method: str) -> ResultRow:
        evaluation = self.models.evaluate(method)
        counts = self.data.transductive() if measures(method) else {}
        n_classes = {task: len(head.weight) for task, head in self.models.heads.items()}
        return make_row(
            method,
            evaluation.known,
            unknown=evaluation.unknown,
            notes=doubts(evaluation.known, n_classes) if method == INDIVIDUAL else [],
            unseen=self.unseen,
            inputs=self.data.noun,
            transductive=[task for task, count in counts.items() if count],
            provenance={
                "code": provenance.code_version(),
                "weights": self.models.digests,
                "data": self.models.inputs(method),
            },
        )


def _message(error: Exception) -> str:
    if isinstance(error, AdamergeError):
        return str(error)
    return f"{type(error).__name__}: {error}\nADAMERGE_TRACEBACK=1 ends at such a row and shows where."


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None


def _require_settings(given: Collection[str]) -> None:
    known = set(signature(MultiTaskData).parameters) - {"tasks"}
    for name in given:
        if name not in known:
            raise InputError(f"--data.{name} is unknown.", nearest(name, known))
