"""`adamerge fit | validate | test | predict`: LightningCLI over configurations that add up."""

import contextlib
import json
import logging
import time
import warnings
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from adamerge import callbacks, ownership, provenance
from adamerge.atomic import refuse_existing, write_text
from adamerge.checkpoints import loading_advice, locate
from adamerge.data.module import MultiTaskData
from adamerge.errors import AdamergeError, InputError, shortlist
from adamerge.evaluation import Evaluation
from adamerge.explain import explain
from adamerge.fitting import placing
from adamerge.fitting.classes import own_classes, require_classes
from adamerge.fitting.composing import class_names, merge_task, model_settings
from adamerge.fitting.process import unchanged_process
from adamerge.fitting.recipe import in_one_line, with_recipe
from adamerge.fitting.settings import require_settings
from adamerge.mixture import latency, stored
from adamerge.plots import write_routing
from adamerge.progress import console, duration, print_line
from adamerge.results import (
    ResultRow,
    doubts,
    make_row,
    outcome,
    print_table,
    write_predictions,
    write_row,
)
from adamerge.tracking import SafeWandbLogger

_NOISE = (
    r"[\s\S]*deprecated in v4",  # Lightning 2.6 calls jsonargparse's old names
    r".*LeafSpec.*",  # Lightning's own pytree helper
    r".*does not have many workers.*",  # our images are in memory
    r"Be aware that when using `ckpt_path`",  # evaluation needs none of the training's callbacks
    r".*returned `None`, this fit will run with no optimizer",  # routing without parameters
    r"LightningCLI's args parameter is intended",  # our front command has read the command line
)
_CLASS_NAMES = (
    *(
        f"adamerge.{name}"
        for name in (
            *("Learned", "Components", "Concrete", "Elements", "Router", "Oracle", "Uniform", "Subspace"),
            *(
                "Entropy",
                "ReliableEntropy",
                "Balanced",
                "KLTeacher",
                "FeatureMatching",
                "Consistency",
                "Prior",
                "Perturbed",
            ),
            *("RoutingEntropy", "TaskIdentity", "Mixed", "SharpnessAware"),
            *("Supervised", "FrankWolfe", "NaturalGradient", "CMAES", "RandomSearch", "BiLevel"),
            *("Surgery",),
        )
    ),
    *(f"torch.optim.{name}" for name in ("Adam", "AdamW", "SGD")),
)


class RunCLI(LightningCLI):
    """One run: its parser, its folder, its callbacks and what it leaves behind."""

    def __init__(
        self,
        command: str,
        claims: ExitStack,
        *args: Any,
        only_parse: bool = False,
        is_row: bool = False,
        **kwargs: Any,
    ) -> None:
        self._command, self._claims, self._began = command, claims, time.monotonic()
        self._only_parse, self._is_row = only_parse, is_row
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]  no static one can know
        """Give the one that was asked for: a parser for each of the four takes as long as a tiny run."""
        return {self._command: super().subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to the run and not to the model."""
        parser.link_arguments("data.tasks", "model.tasks")
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_argument("--run_dir", type=str, default="runs/fit", help="Folder of the run.")
        parser.add_argument("--method", type=str, default="adaptive", help="Name of the row in tables.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace an old run.")
        parser.add_argument(
            "--resume_anyway", type=bool, default=False, help="Resume although inputs have changed."
        )
        parser.add_argument("--save_every", type=int, default=10, help="Steps between checkpoints.")
        parser.add_argument("--selector", type=callbacks.Selector, default={})
        parser.add_argument("--gate", type=dict[str, float], default={}, help="Read by `adamerge bench run`.")
        parser.add_argument(
            "--evaluate_baselines",
            type=bool,
            default=True,
            help="Of a router: oracle, hard top-1, uniform, shared.",
        )
        parser.add_argument(
            "--evaluate_start", type=bool, default=False, help="Also under the initial coefficients."
        )
        parser.add_argument(
            "--evaluate_experts", type=bool, default=True, help="Needed for the normalised mean."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a complaint becomes the reason and the nearest valid key."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            known = self._parser(self._command).get_defaults(skip_validation=True).keys()
            raise InputError(*explain(str(error), known, _CLASS_NAMES)) from error
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise InputError(*explain(str(error), (), _CLASS_NAMES)) from error
        require_settings(self.config[self._command], self._command)
        if self._only_parse:
            raise _Parsed

    def instantiate_classes(self) -> None:
        """Compose the run; what a part's constructor refuses is told in the part's own words."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, AdamergeError):
                cause = cause.__cause__ or cause.__context__
            raise cause or InputError(*explain(str(error), (), _CLASS_NAMES)) from error

    @property
    def settings(self) -> Any:
        """The resolved configuration of the subcommand."""
        return self.config[str(self.subcommand)]

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self._place.folder

    @cached_property
    def _place(self) -> placing.Place:
        settings, run = self.settings, Path(self.settings.run_dir)
        if self.subcommand != "fit":
            return placing.Place(run, run, is_resuming=True)
        config = yaml.safe_load(self._resolved)
        asked = placing.Asked(run, settings.overwrite, settings.ckpt_path, config, _sources_of(config))
        return placing.claim_run(asked, self._claims)

    def before_instantiate_classes(self) -> None:
        """Look at what can be wrong before any work."""
        if str(self.settings.trainer.precision) in ("16", "16-mixed") and not torch.cuda.is_available():
            raise InputError("precision 16-mixed needs a GPU.", "Use bf16-mixed or 32-true on a CPU.")
        if self.subcommand == "fit" and self.settings.save_every < 1:
            raise InputError(f"save_every={self.settings.save_every}.", "It must be 1 or more.")
        path = self.settings.ckpt_path
        if path not in (None, "last") and not Path(path).exists():
            raise InputError(f"checkpoint {path} does not exist.", "Use --ckpt_path last, or a file's path.")
        if self.subcommand == "fit":
            self._enter_folder()
            return
        if path == "last":
            self.settings.ckpt_path = str(self._last_checkpoint())
        if "verbose" in self.settings:
            self.settings.verbose = False  # `after_validate` and `after_test` print a table of ours

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the callbacks and paths that every run has.

        Raises:
            InputError: Lightning's Trainer refuses its settings.
        """
        kwargs.setdefault("default_root_dir", str(self.folder))
        if self.subcommand == "fit":
            kwargs["callbacks"] = [*kwargs.get("callbacks", []), *self._callbacks()]
            kwargs["plugins"] = _with_atomic_checkpoints(kwargs.get("plugins"))
            kwargs["limit_val_batches"] = 0  # the selector looks at held-out images in its own rhythm
        try:
            return super().instantiate_trainer(**kwargs)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"trainer: {(str(error).splitlines() or [repr(error)])[0][:300]}") from error

    def _callbacks(self) -> list[pl.Callback]:
        settings = self.settings
        selector = self.config_init[str(self.subcommand)].selector
        like = locate(settings.model.base)
        return [
            callbacks.StepBar(settings.method),
            callbacks.Curves(self.folder),
            selector,
            callbacks.CoefficientReport(self.folder),
            callbacks.MergedModel(self.folder / "merged", like, self._card()),
            callbacks.LastCheckpoint(self.folder / "checkpoints", settings.save_every),
        ]

    def before_fit(self) -> None:
        """Write the resolved configuration and the digests of all inputs; compare when resuming."""
        self._require_steps()
        self.datamodule.use(self.model.backbone)
        self.datamodule.use_heads(self.model.heads)
        self.model.require_together(self.datamodule, self.trainer, fits=True)
        inputs = self._inputs()
        path = self.folder / provenance.INPUTS
        if self._place.is_resuming and path.exists() and not self.settings.resume_anyway:
            provenance.require_same_inputs(provenance.read_inputs(self.folder), inputs)
        if self.trainer.is_global_zero:
            console.print(f"Recipe: {self._recipe}.", soft_wrap=True, markup=False, highlight=False)
            write_text(self.folder / "config.yaml", self._resolved)
            write_text(path, json.dumps(inputs, indent=2) + "\n")
            for logger in self.trainer.loggers:
                logger.log_hyperparams(inputs)

    def _require_steps(self) -> None:
        """Refuse to learn in no step, and to take steps where nothing can be learned."""
        steps, kind = self.trainer.max_steps, type(self.model.coefficients).__name__
        learns = any(True for _ in self.model.learned.parameters())
        if steps < 1 and learns:
            raise InputError(f"trainer.max_steps={steps}.", "It must be 1 or more.")
        if steps != 0 and not learns:
            raise InputError(f"{kind} has nothing to learn.", "Set trainer.max_steps to 0.")

    def after_fit(self) -> None:
        """Keep the end as last checkpoint, evaluate, and write the result row and the manifest."""
        self.trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
        if self.trainer.is_global_zero:
            row = self.result()
            write_row(self.folder / "result.json", row)
            if row.details.get("routing"):
                write_routing(self.folder, *(row.details[part] for part in ("experts", "routing", "entropy")))
            write_text(self.folder / "merged" / "README.md", self._card(row))
            provenance.write_manifest(self.folder)
            self._log(row)
            placing.complete(self._place)
            self._close(row)

    def _close(self, row: ResultRow) -> None:
        """Print what was reached; of a row of a table, which shows it with the others, in one line alone."""
        run = self._place.run
        reached = (
            f"{self.settings.method}: {outcome(row)}; {self.trainer.global_step} steps, "
            f"{duration(time.monotonic() - self._began)}."
        )
        if self._is_row:
            print_line(reached)
            return
        print_table([row], str(run))
        print_line(f"{reached} Files: {run}. {loading_advice(run / 'merged')}")

    def after_validate(self) -> None:
        """Print the label-free measures."""
        for name, value in sorted(self.trainer.callback_metrics.items()):
            console.print(f"{name}: {float(value):.4f}")

    def after_test(self) -> None:
        """Print the row."""
        print_table([make_row(self.settings.method, self.model.accuracy)], str(self.folder))

    def after_predict(self) -> None:
        """Write ``predictions.csv``: one line per image."""
        found = self.trainer.predict_loop.predictions
        loaders = [found] if len(self.datamodule.tasks) == 1 else found  # Lightning flattens one loader
        batches = [batch for loader in loaders for batch in loader]
        path = self.folder / "predictions.csv"
        classes = {task: self.datamodule.class_names(task) for task in self.datamodule.tasks}
        is_run = ownership.kind_of(self.folder) == "run"
        if not is_run:
            refuse_existing(path, overwrite=False)
        with ownership.claimed(self.folder, "run", lock=False) if is_run else nullcontext():
            write_predictions(path, batches, classes)
        console.print(f"Predictions are in {path}.")

    def result(self) -> ResultRow:
        """Evaluate the merged model, and the experts if the normalised mean is wanted."""
        task, data = self.model, self.datamodule
        evaluation = task.evaluation()
        individual = task.evaluate_experts() if self.settings.evaluate_experts else None
        selector = self.config_init[str(self.subcommand)].selector
        shared = [name for name, count in data.transductive().items() if count]
        row = make_row(
            self.settings.method,
            evaluation.known,
            individual,
            unknown=evaluation.unknown,
            unseen=[name for name in data.tasks if name not in task.vectors.tasks],
            transductive=shared,
            inputs=data.noun,
            notes=[
                *([selector.verdict] if selector.verdict else []),
                *self._beyond_one_model(),
                *self._notes_of_heads(),
            ],
            details=self._details(evaluation),
            provenance=provenance.read_inputs(self.folder),
        )
        n_classes = {name: len(head.weight) for name, head in task.heads.items()}
        row.notes += doubts(individual or {}, n_classes, row)
        return row

    def _details(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return what the row tells beside accuracies."""
        more = self._routing_details(evaluation) | self._agreement()
        return {"recipe": self._recipe} | self._start_details() | more

    def _beyond_one_model(self) -> list[str]:
        """Say so where labels of adaptation images were read, and where tasks have parts of their own."""
        note = f"learned on labels of adaptation {self.datamodule.noun}"
        labelled = [note] if self.model.objective.needs_labels else []
        return labelled + (["an adapter per task"] if self.model.adapters is not None else [])

    def _start_details(self) -> dict[str, Any]:
        """Tell the accuracy under the initial coefficients, where it is wanted."""
        return {"start": self.model.evaluate_start()} if self.settings.evaluate_start else {}

    def _agreement(self) -> dict[str, Any]:
        """Tell how often merged model and expert name the same class, where the selector has looked."""
        found = self.config_init[str(self.subcommand)].selector.agreement
        return {"agreement": found} if found else {}

    def _routing_details(self, evaluation: Evaluation) -> dict[str, Any]:
        """Tell who was routed where, what the honest baselines reach, and what the mixture costs."""
        mixture = self.model.mixture
        if mixture is None:
            return {}
        baselines = mixture.baselines() if self.settings.evaluate_baselines else {}
        held_out = self.datamodule.held_out(self.datamodule.adapting_tasks[0])
        images = held_out.part(torch.arange(min(self.datamodule.eval_batch_size, len(held_out)))).images
        return {
            "experts": list(mixture.vectors.tasks),
            "routing": evaluation.routing,
            "entropy": evaluation.entropy,
            "baselines": {name: self.model.evaluation(model).known for name, model in baselines.items()},
            "stored": {part: size._asdict() for part, size in stored(mixture).items()},
            "seconds_per_batch": latency(mixture, images),
        }

    def _log(self, row: ResultRow) -> None:
        metrics = {f"eval/acc/{task}": value for task, value in row.accuracy.items()}
        means = {"eval/acc_mean": row.mean, "eval/normalized_mean": row.normalized_mean}
        metrics |= {name: value for name, value in means.items() if value is not None}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)
            if isinstance(logger, SafeWandbLogger):
                if row.details.get("routing"):
                    logger.log_picture("routing/map", str(self.folder / "routing.png"))
                logger.close()

    def _enter_folder(self) -> None:
        """Claim the folder; where the run is written beside an old one, so are its logs."""
        has_last = (self.folder / placing.LAST).exists()
        if not self._place.is_resuming or (self.settings.ckpt_path == "last" and not has_last):
            self.settings.ckpt_path = None
        if self._place.replaces:
            loggers = self.settings.trainer.logger
            for logger in loggers if isinstance(loggers, list) else [loggers]:
                given = getattr(logger, "init_args", None)
                if given is not None and given.get("save_dir") == self.settings.run_dir:
                    given.save_dir = str(self.folder)

    def _last_checkpoint(self) -> Path:
        path = self.folder / "checkpoints" / "last.ckpt"
        if not path.exists():
            raise InputError(
                f"{self.folder} has no checkpoint.", "Name the run: --run_dir RUN --ckpt_path last"
            )
        return path

    def _inputs(self) -> dict[str, Any]:
        return {
            "schema_version": provenance.SCHEMA_VERSION,
            "folder": str(Path.cwd()),  # relative paths of the configuration start here
            "weights": dict(self.model.vectors.digests),
            "data": self.datamodule.fingerprint(labelled=self.model.objective.needs_labels),
            "files": model_settings(self.settings.model.base, self.settings.model.experts),
            "tasks": class_names(self.datamodule.tasks),
            "preprocessing": json.loads(self.datamodule.transform_key or "{}"),
            "config": yaml.safe_load(self._resolved),
            "code": provenance.code_version(),
        }

    @cached_property
    def _resolved(self) -> str:
        config = self.settings.clone()
        for name in ("ckpt_path", "config", "overwrite", "resume_anyway"):
            config.pop(name, None)
        return self._parser(self.subcommand).dump(config, skip_none=False, skip_link_targets=True)

    def _notes_of_heads(self) -> list[str]:
        """Say which tasks' heads are made with text towers that are not among the merged weights."""
        own = [task for task, head in self.model.heads.items() if head.own_tower]
        text = "made with the experts' own text towers; among the weights is the base's."
        return [f"Heads of {shortlist(own)}: {text}"] if own else []

    @cached_property
    def _recipe(self) -> str:
        return in_one_line(self.settings)

    def _card(self, row: ResultRow | None = None) -> str:
        sources = {"base": self.settings.model.base, **self.settings.model.experts}
        config = yaml.safe_load(self._resolved)
        kind: dict[str, Any] = {
            "routed": self.model.mixture is not None,
            "adapted": self.model.adapters is not None,
            "notes": self._notes_of_heads(),
        }
        return provenance.model_card(sources, self.model.vectors.digests, config, row, **kind)


def _with_atomic_checkpoints(plugins: Any) -> list[Any]:
    """Add our way of writing checkpoints, unless the configuration has one of its own."""
    given = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
    has_own = any(isinstance(plugin, CheckpointIO) for plugin in given)
    return [*given, *([] if has_own else [callbacks.AtomicCheckpointIO()])]


def _sources_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Name all paths that a configuration reads, by role."""
    model, tasks = config["model"], config["data"].get("tasks") or {}
    found = {"the base": model["base"], "the shared model": model.get("shared")}
    found |= {f"expert {name!r}": path for name, path in (model.get("experts") or {}).items()}
    for name, row in tasks.items():
        found |= {f"{part} of task {name!r}": row.get(part) for part in ("adapt", "test", "head")}
    return {role: path for role, path in found.items() if isinstance(path, str)}


class _Parsed(Exception):
    """The configuration was parsed, and that was all."""


def run(args: Sequence[str], *, is_row: bool = False) -> RunCLI:
    """Run one subcommand with these command line arguments.

    Args:
        args: The command line.
        is_row: Whether the run is a row of a table, which is shown when all rows are there.

    Raises:
        AdamergeError: Something that we can name is wrong.
        jsonargparse.ArgumentError: A key or value of the configuration is wrong.
    """
    args = _spelled_out(args)
    with own_classes(args), unchanged_process():
        return _run(args, is_row=is_row)


def check(args: Sequence[str]) -> None:
    """Parse a command line of `adamerge fit`, import the classes that it names, and open nothing.

    Raises:
        InputError: A key or value is wrong, or a class is missing or takes other options.
    """
    args = _spelled_out(args)
    with own_classes(args), unchanged_process(), contextlib.suppress(_Parsed):
        _run(args, only_parse=True)


def _spelled_out(args: Sequence[str]) -> list[str]:
    """Return a command line in which Lightning's ``-c FILE`` is ``--config=FILE``."""
    words = list(args)
    for place, word in reversed([*enumerate(words[:-1])]):
        if word == "-c":
            words[place : place + 2] = [f"--config={words[place + 1]}"]
    return words


def _run(args: Sequence[str], **how: bool) -> RunCLI:
    require_classes(args)
    args = with_recipe(args)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)  # tips and remarks that no user needs
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        return _run_cli(args, **how)


def _run_cli(args: Sequence[str], **how: bool) -> RunCLI:
    """Run; the exit with which the trainer answers Ctrl-C is an interrupt again."""
    try:
        with ExitStack() as claims:
            return RunCLI(
                args[0],
                claims,
                merge_task,
                MultiTaskData,
                **how,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults={
                    "logger": False,
                    "max_epochs": -1,  # the stream has no end; steps count
                    "max_steps": 500,
                    "devices": 1,
                    "use_distributed_sampler": False,
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                    "enable_progress_bar": False,
                },
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=list(args),
            )
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise leaving.__context__ from None
        raise
