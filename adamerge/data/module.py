"""The Lightning data module: one stream of unlabelled batches per task, and labelled test images."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytorch_lightning as pl
import torch
from jaxtyping import Int64
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from adamerge.data.datasets import Images, Preprocess, load_images
from adamerge.data.labels import HeadClasses, head_names, match_labels, match_names
from adamerge.data.sampling import StepSampler
from adamerge.data.tasks import TaskSpec, resolve
from adamerge.data.texts import preprocessing_of
from adamerge.errors import AdamergeWarning, InputError, nearest, shortlist
from adamerge.ranges import Natural, Range, Seed, checked

Batch = dict[str, dict[str, Tensor]]
Order = Literal["shuffled", "given"]
LABELS = "adaptation labels"  # what a fingerprint calls them


class MultiTaskData(pl.LightningDataModule):
    """Unlabelled adaptation images and labelled test images of several tasks.

    Each training batch is ``{task: {"images": uint8 [image, 3, h, w], "index": [image]}}``. A part of
    the adaptation images is held out for label-free monitoring (`validate`, the selector). Under
    several processes the tasks are dealt out to them in turn. A task without adaptation images is
    evaluated only.

    Args:
        tasks: Rows by task name.
        batch_size: Adaptation images per task and step, where the task's row has no number of its own.
        eval_batch_size: Images per batch elsewhere.
        holdout: Fraction of each task's adaptation images that adaptation does not see.
        seed: Seed of the order of images, and of what is held out.
        shots: Adaptation images per task that adaptation uses, chosen by the seed; 0: all.
        num_workers: Worker processes per loader; the images do not depend on it.
        cache: Keep decoded images in the cache folder, where a model's preprocessing has a name.
        order: Of adaptation images: "shuffled" anew every epoch; or "given": each task's as its source has
            them, without those held out, which stay random. A source sorted by class is then a stream of
            batches of one class.
        max_length: Tokens at which texts are cut; default: the model's own length.

    Raises:
        InputError: A row or an option is wrong.
    """

    @checked
    def __init__(
        self,
        tasks: dict[str, TaskSpec],
        *,
        batch_size: Annotated[int, Range("[1, 1e6]")] = 16,
        eval_batch_size: Annotated[int, Range("[1, 1e6]")] = 256,
        holdout: Annotated[float, Range("[0, 1)")] = 0.2,
        seed: Seed = 0,
        shots: Natural = 0,
        num_workers: Annotated[int, Range("[0, 256]")] = 0,
        cache: bool = True,
        order: Order = "shuffled",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length={max_length}.", "It must be 1 or more.")
        if order not in get_args(Order):
            raise InputError(f"order={order!r} is unknown.", nearest(order, get_args(Order)))
        self.tasks = resolve(tasks)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.holdout, self.seed, self.num_workers, self.cache = holdout, seed, num_workers, cache
        self.shots, self.order, self.max_length = shots, order, max_length
        self.modality: str | None = None
        self.first_step = 0
        self.preprocess: Preprocess | None = None
        self.transform_key: str | None = None
        self._loaded: dict[tuple[str, str], Images] = {}
        self._splits: dict[str, tuple[Images, Images]] = {}
        self._heads: dict[str, HeadClasses] = {}
        if any(self.batch_size_of(task) == 1 for task in self.adapting_tasks):
            warnings.warn(
                "batch_size=1: the entropy of single images collapses easily; 16 is usual.",
                AdamergeWarning,
                stacklevel=2,
            )

    def use(self, backbone: Any) -> None:
        """Prepare images, or texts, for a backbone: by its preprocessing, which its key names.

        Raises:
            InputError: The backbone does not read ``max_length`` tokens.
        """
        preprocess, key = preprocessing_of(backbone, self.max_length)
        is_known = key == self.transform_key if key else preprocess == self.preprocess
        if self.preprocess is not None and not is_known:  # what was loaded is another model's
            self._loaded, self._splits = {}, {}
        self.preprocess, self.transform_key = preprocess, key or None
        self.modality = getattr(backbone, "modality", None)

    @property
    def noun(self) -> str:
        """What messages call the inputs: "images", or "texts" where a backbone reads these."""
        return "texts" if self.modality == "text" else "images"

    def use_heads(self, heads: Mapping[str, Any]) -> None:
        """Match labels with the rows of these heads from now on, by name where names are known.

        Args:
            heads: Heads by task: ``weight [class, dim]``, and what their files call the rows (``classes``).
                Rows of a file that does not name them are called like the configured classes; those of
                zero-shot heads are in the order of the classes.
        """
        for task, spec in self.tasks.items():
            if task in heads:
                head = heads[task]
                self._heads[task] = HeadClasses(
                    len(head.weight), head.classes, by_classes=bool(spec.head or head.names)
                )

    def class_names(self, task: str) -> list[str]:
        """Return the names of the classes in the order of the head's rows; empty where nothing names them.

        Raises:
            DataError: The configured classes and those of the head cannot be matched.
        """
        head = self._heads.get(task, HeadClasses())
        return list(head_names(task, self.tasks[task].classes, head))

    def batch_size_of(self, task: str) -> int:
        """Give the number of a task's adaptation images per step."""
        return self.tasks[task].batch_size or self.batch_size

    def adaptation(self, task: str) -> Images:
        """Give the unlabelled images that training steps draw from."""
        return self._split(task)[0]

    def adaptation_labels(self, task: str) -> Int64[Tensor, " image"]:
        """Give the labels of `adaptation`'s images, to objectives that say that they read labels.

        Raises:
            DataError: There are no labels, or they do not fit the task's classes.
        """
        return self._labels(task, 0)

    def held_out_labels(self, task: str) -> Int64[Tensor, " image"]:
        """Give the labels of `held_out`'s images: see `adaptation_labels`."""
        return self._labels(task, 1)

    def held_out(self, task: str) -> Images:
        """Give the unlabelled images kept aside for monitoring; all of them where holdout is 0."""
        return self._split(task)[1]

    def test(self, task: str) -> Images:
        """Return the labelled test images; labels are rows of the task's head.

        Raises:
            DataError: Labels do not fit the task's classes.
        """
        images = self._images(task, "test", self.tasks[task].test, labelled=True)
        return self._matched(task, images, "test")

    @property
    def adapting_tasks(self) -> tuple[str, ...]:
        """Tasks that have adaptation images."""
        return tuple(task for task, spec in self.tasks.items() if spec.adapt)

    @property
    def tested_tasks(self) -> tuple[str, ...]:
        """Tasks that have labelled test images."""
        return tuple(task for task, spec in self.tasks.items() if spec.test)

    def transductive(self) -> dict[str, int]:
        """Count, per task, the test images that are among the adaptation images (equal pixels)."""
        counts = {}
        for task in self.tested_tasks:
            seen = set(self.all_adaptation(task).digests()) if self.tasks[task].adapt else set()
            counts[task] = sum(image in seen for image in self.test(task).digests())
        return counts

    def fingerprint(self, *, labelled: bool = False) -> dict[str, str]:
        """Hash every task's images, test labels and head file (SHA-256), for reports and for resuming.

        Args:
            labelled: Hash the adaptation images' labels, too, for objectives that read them.
        """
        parts = {f"{t} adaptation": _contents(self.all_adaptation(t)) for t in self.adapting_tasks}
        parts |= {f"{task} test": _contents(self.test(task)) for task in self.tested_tasks}
        if labelled:
            parts |= {f"{t} {LABELS}": _contents(self._labelled(t)) for t in self.adapting_tasks}
        heads = {task: spec.head for task, spec in self.tasks.items() if spec.head}
        parts |= {f"{task} head": [Path(head).read_bytes()] for task, head in heads.items()}
        return {name: hashlib.sha256(b"".join(digests)).hexdigest() for name, digests in parts.items()}

    def loader(self, images: Images) -> DataLoader[Any]:
        """Walk images once, in order, in this process."""
        return DataLoader(images, batch_size=self.eval_batch_size, collate_fn=_first)

    def train_dataloader(self) -> CombinedLoader:
        """Stream batches of the tasks of this process, from ``first_step`` on, without end."""
        return CombinedLoader({t: self._stream(t) for t in self.tasks_here()}, "min_size")

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Walk each task's held-out adaptation images (no labels).

        Raises:
            InputError: There are none.
        """
        self._require_adaptation()
        return [self.loader(self.held_out(task)) for task in self.adapting_tasks]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Walk each task's labelled test images.

        Raises:
            InputError: There are none.
        """
        if not self.tested_tasks:
            problem = f"no task has test {self.noun}: there is nothing to measure."
            raise InputError(problem, "Set data.tasks.TASK.test.")
        return [self.loader(self.test(task)) for task in self.tested_tasks]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Walk each task's test images, or its adaptation images where it has none."""
        return [
            self.loader(self.test(task) if spec.test else self.all_adaptation(task))
            for task, spec in self.tasks.items()
        ]

    def tasks_here(self) -> tuple[str, ...]:
        """Give the tasks whose training batches this process computes."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        tasks = self._require_adaptation()
        if world > len(tasks):
            raise InputError(
                f"{world} processes for {len(tasks)} tasks: some would have nothing to do.",
                f"Use at most --trainer.devices {len(tasks)}.",
            )
        return tasks[rank::world]

    def state_dict(self) -> dict[str, Any]:
        """Remember which step comes next."""
        return {"step": self.trainer.global_step if self.trainer else self.first_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Begin where the checkpoint was written."""
        self.first_step = int(state_dict["step"])

    def _require_adaptation(self) -> tuple[str, ...]:
        if not self.adapting_tasks:
            raise InputError(f"no task has adaptation {self.noun}.", "Set data.tasks.TASK.adapt.")
        return self.adapting_tasks

    def _stream(self, task: str) -> DataLoader[Any]:
        images, batch_size = self.adaptation(task), self.batch_size_of(task)
        if len(images) < batch_size:
            warnings.warn(
                f"task {task!r} has {len(images)} adaptation {self.noun}, fewer than a batch of "
                f"{batch_size}: some come twice in a step.",
                AdamergeWarning,
                stacklevel=2,
            )
        options: dict[str, Any] = {"seed": self.seed, "task": task, "first_step": self.first_step}
        sampler = StepSampler(len(images), batch_size, shuffle=self.order == "shuffled", **options)
        return DataLoader(images, batch_sampler=sampler, num_workers=self.num_workers, collate_fn=_first)

    def _split(self, task: str) -> tuple[Images, Images]:
        """Give the parts to adapt on and to monitor."""
        if task not in self._splits:
            self._splits[task] = self._cut(self.all_adaptation(task))
        return self._splits[task]

    def _cut(self, images: Images) -> tuple[Images, Images]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(images), generator=generator)
        n_held = int(self.holdout * len(images))
        used = order[n_held:][: self.shots or None]
        adapt = images if len(used) == len(images) else images.part(used.sort().values)
        return adapt, images.part(order[:n_held].sort().values) if n_held else adapt

    def _labels(self, task: str, part: int) -> Tensor:
        images = self._matched(task, self._labelled(task), "adaptation")
        labels = self._cut(images)[part].labels
        assert labels is not None  # `_images` loads them or raises
        return labels

    def all_adaptation(self, task: str) -> Images:
        """Return all unlabelled images of a task, held out or not."""
        is_new = (task, "adaptation") not in self._loaded
        images = self._images(task, "adaptation", self.tasks[task].adapt, labelled=False)
        if is_new:
            self._warn_of_other_classes(task, images)
        return images

    def _matched(self, task: str, images: Images, part: str) -> Images:
        return match_labels(task, images, self.tasks[task].classes, self._heads.get(task), part)

    def _warn_of_other_classes(self, task: str, images: Images) -> None:
        """Say so where the images' own classes have no name in common with the task's."""
        names, classes = images.origin.classes, self.class_names(task)
        if all(name.isdecimal() for name in names):
            return  # they number the classes
        if len(names) > 1 and classes and not match_names(names, classes):
            warnings.warn(
                f"task {task!r}: adaptation {self.noun} have the classes [{shortlist(names)}], the task has "
                f"[{shortlist(classes)}]: are they its {self.noun}?",
                AdamergeWarning,
                stacklevel=2,
            )

    def _labelled(self, task: str) -> Images:
        return self._images(task, "labelled adaptation", self.tasks[task].adapt, labelled=True)

    def _images(self, task: str, part: str, source: str | None, *, labelled: bool) -> Images:
        if (task, part) not in self._loaded:
            role = f"task {task!r}, {part} {self.noun}"
            if source is None:
                name = {"adaptation": "adapt"}.get(part, part)
                raise InputError(f"{role}: none were given.", f"Set data.tasks.{task}.{name}.")
            spec = self.tasks[task]
            self._loaded[task, part] = load_images(
                source,
                self.preprocess or _no_preprocess,
                labelled=labelled,
                role=role,
                image_column=spec.image_column,
                label_column=spec.label_column,
                corruption=spec.corruption if part == "test" else spec.adapt_corruption or spec.corruption,
                transform_key=self.transform_key if self.cache else None,
                columns=spec.columns,
                modality=self.modality,
            )
        return self._loaded[task, part]


def _contents(images: Images) -> list[bytes]:
    """Give what a fingerprint hashes: the images, and labels where they were kept."""
    labels = [] if images.labels is None else [images.labels.numpy().tobytes()]
    return [*images.digests(), *labels]


def _first(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`Images` gives a whole batch at once, so there is nothing to collate."""
    return batches[0]


def _no_preprocess(_image: Any) -> Tensor:
    raise InputError(
        "images from files need the model's preprocessing, and no model was set.",
        "Use the data module with a MergeTask and a Trainer, or set data.preprocess first.",
    )
