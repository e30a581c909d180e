"""Cases of the study: what becomes of a benchmark in each of them, and the grid's compositions.

A case is a document as `adamerge.benchmarks.Benchmark` reads it, made when it is its turn: some write
images or an expert below the study's folder first.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from adamerge.atomic import atomic_file, write_text
from adamerge.benchmarks import Benchmark, method_file
from adamerge.checkpoints import save_tensors
from adamerge.data.datasets import Images, load_images
from adamerge.data.tasks import EMBEDDED
from adamerge.errors import DataError, InputError
from adamerge.models.evaluate import predict_all

Document = dict[str, Any]
Labelled = tuple[Tensor, Tensor | None]
NOISE = 80.0  # standard deviation of the corrupted case's pixel noise, of 255
USELESS_SEED = NOISE_SEED = 0
SHOTS = {"16": 16, "64": 64, "256": 256, "all": 0}
FACTORS = {"1/4": 0.25, "1/2": 0.5, "1": 1.0, "2": 2.0, "4": 4.0}

# The grid: every start with every objective in every grouping; all take the same optimizer and steps.
STARTS: dict[str, Document] = {
    "start_0.1": {"initial": 0.1},
    "start_0.3": {"initial": 0.3},
    "start_average": {"initial": 0.3, "shared": "average"},  # equal coefficients give the average itself
    "start_ties": {"initial": 0.0, "shared": "ties"},
    "start_tsv": {"initial": 0.0, "shared": "tsv"},
    "start_iso_c": {"initial": 0.0, "shared": "iso_c"},
    "start_trimmed": {"initial": 0.3, "edit": "ties_trim", "edit_options": {"density": 0.2}},
}
OBJECTIVES: dict[str, Document] = {
    "entropy": {"class_path": "adamerge.Entropy"},
    "balanced": {"class_path": "adamerge.Balanced", "init_args": {"weight": 1.0, "window": 32.0}},
    "kl": {"class_path": "adamerge.KLTeacher", "init_args": {"temperature": 2.0}},
    "features": {"class_path": "adamerge.FeatureMatching", "init_args": {"distance": "l1"}},
}
SPACES: dict[str, Document] = {
    "task": {"class_path": "adamerge.Learned", "init_args": {"grouping": "task"}},
    "tensor": {"class_path": "adamerge.Learned", "init_args": {"grouping": "tensor"}},
    "component": {"class_path": "adamerge.Components", "init_args": {"kind": "weight"}},
    "row": {"class_path": "adamerge.Elements", "init_args": {"per": "row"}},
    "entry": {"class_path": "adamerge.Elements", "init_args": {"per": "entry"}},
}
OPTIMIZER: Document = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3.0e-2}}
GRID_STEPS = 100


@dataclass(frozen=True)
class Case:
    """A column of a table.

    Attributes:
        name: Its head.
        make: Gives the document.
        factor: Of the steps of every method that learns.
        methods: What is run in the place of the methods that the user named.
        options: Further arguments of every method that learns; they win over its file.
    """

    name: str
    make: Callable[[], Document]
    factor: float = 1.0
    methods: Sequence[str] = field(default_factory=list)
    options: Sequence[str] = ()


class Source:
    """A benchmark that variants are made of.

    Args:
        document: The benchmark.
        folder: Where written images and experts go.
    """

    def __init__(self, document: Document, folder: Path) -> None:
        self.document, self.folder = deepcopy(document), folder
        self.benchmark = Benchmark(document, folder / "benchmark")
        self.document.pop("gate", None)  # it is passed once, on the benchmark as it is
        self.notes: dict[str, str] = {}

    @cached_property
    def adapting(self) -> list[str]:
        """The tasks that are adapted on."""
        return list(self.benchmark.data.adapting_tasks)

    @property
    def is_embedded(self) -> bool:
        """Whether any images are those of the package."""
        specs = self.benchmark.data.tasks
        return any((specs[task].adapt or "").startswith(EMBEDDED) for task in self.adapting)

    def variant(self, rows: Mapping[str, Document] | None = None, **data: Any) -> Document:
        """Give the benchmark with other values in some tasks' rows, and other settings of the images."""
        document = deepcopy(self.document)
        document["data"] |= data
        for task, changes in (rows or {}).items():
            document["data"]["tasks"][task] |= changes
        return document

    def with_expert(self, name: str, expert: str) -> Document:
        """Give the benchmark with one more expert, which has no images."""
        document = deepcopy(self.document)
        document["model"]["experts"] |= {name: expert}
        return document

    def with_images(self, case: str, change: Callable[[str], Labelled]) -> Document:
        """Give the benchmark with other adaptation images, which are written first."""
        rows = {}
        for task in self.adapting:
            spec, path = self.benchmark.data.tasks[task], self.folder / case / f"{task}.parquet"
            write_images(path, *change(task), (spec.image_column or "image", spec.label_column or "label"))
            rows[task] = {"adapt": str(path), "classes": spec.classes, "templates": spec.templates}
        return self.variant(rows)

    def images(self, task: str, *, labelled: bool = False) -> Images:
        """Load a task's adaptation images, as its model sees them."""
        spec, backbone = self.benchmark.data.tasks[task], self.benchmark.models.backbone
        if spec.adapt is None or backbone.modality != "image":
            raise InputError(f"task {task!r} has no images to adapt on.", "Choose other --cases.")
        return load_images(
            spec.adapt,
            backbone.preprocess,
            labelled=labelled,
            role=f"task {task!r}, adaptation images",
            image_column=spec.image_column,
            label_column=spec.label_column,
            transform_key=backbone.transform_key or None,
        )

    def labels(self, task: str) -> Tensor | None:
        """Give the labels of a task's adaptation images, where there are any."""
        try:
            return self.images(task, labelled=True).labels
        except DataError:
            return None

    def predicted(self, task: str) -> Tensor:
        """Give what a task's own expert says of its adaptation images."""
        models, loader = self.benchmark.models, self.benchmark.data.loader(self.images(task))
        weights = models.read(models.vectors.state(models.vectors.one_hot(task)))
        device = next(iter(weights.values())).device
        models.backbone.to(device)
        return predict_all(weights, models.backbone, models.heads[task].to(device), loader).argmax(-1)


def stress(source: Source) -> Iterator[Case]:
    """Give the cases that break methods."""
    tasks, data = source.adapting, source.benchmark.data
    large = {tasks[0]: {"batch_size": 10 * data.batch_size}}
    yield Case("clean", source.variant)
    yield Case("unbalanced", partial(source.variant, large), options=batches_of(data.batch_size))
    for size in (1, 2, 4):
        yield Case(f"batch_{size}", partial(source.variant, batch_size=size), options=batches_of(size))
    yield Case("one_class", partial(one_class, source))
    yield Case("corrupted", partial(corrupted, source))
    if not source.is_embedded:  # those are too small for the library
        rows = {task: {"adapt_corruption": "gaussian_noise/3"} for task in tasks}
        yield Case("gaussian_noise", partial(source.variant, rows))
    yield Case("useless", partial(useless, source))
    yield Case("duplicate", partial(duplicate, source))
    yield Case("foreign", partial(foreign, source))
    tested = {task: {"adapt": data.tasks[task].test} for task in tasks if data.tasks[task].test}
    yield Case("transductive", partial(source.variant, tested))


def batches_of(size: int) -> tuple[str, str]:
    """Give the arguments that set the batch size, whatever a method's file says."""
    return "--data.batch_size", str(size)


def fractions(source: Source) -> Iterator[Case]:
    """Give the cases of fewer adaptation images."""
    for name, shots in SHOTS.items():
        yield Case(name, partial(source.variant, shots=shots), options=("--data.shots", str(shots)))


def steps(source: Source) -> Iterator[Case]:
    """Give the cases of fewer and more steps."""
    for name, factor in FACTORS.items():
        yield Case(name, source.variant, factor)


def grid(source: Source) -> Iterator[Case]:
    """Give a case per coefficient space, in which every start meets every objective."""
    for space in SPACES:
        folder = source.folder.parent / "methods" / space
        yield Case(space, source.variant, methods=[str(f) for f in compositions(folder, space)])


TABLES = {"stress": stress, "fractions": fractions, "steps": steps, "grid": grid}


def compositions(folder: Path, space: str) -> Iterator[Path]:
    """Write the method files of one coefficient space."""
    for start, row in STARTS.items():
        more = dict(row)
        coefficients = deepcopy(SPACES[space])
        coefficients["init_args"]["initial"] = more.pop("initial")
        for name, objective in OBJECTIVES.items():
            model = {**more, "objective": objective, "optimizer": OPTIMIZER, "decay": "linear"}
            model["coefficients"] = coefficients
            path = folder / f"{start}-{name}.yaml"
            document = {"model": model, "trainer": {"max_steps": GRID_STEPS}}
            write_text(path, yaml.safe_dump(deepcopy(document), sort_keys=False))
            yield path


def one_class(source: Source) -> Document:
    """Sort the images by class, and adapt on them in that order."""

    def sort(task: str) -> Labelled:
        labels = source.labels(task)
        if labels is None:
            source.notes["one_class"] = "sorted by the experts' predictions where sources have no labels"
        order = (source.predicted(task) if labels is None else labels).argsort(stable=True)
        return source.images(task).images[order], None if labels is None else labels[order]

    document = source.with_images("one_class", sort)
    document["data"]["order"] = "given"
    return document


def corrupted(source: Source) -> Document:
    """Adapt on noisy images."""
    return source.with_images("corrupted", lambda t: (noisy(source.images(t)), source.labels(t)))


def noisy(images: Images) -> Tensor:
    """Add strong noise to all images, and put nothing but noise in the place of every third one."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    clean = images.images.float()
    found = (clean + NOISE * torch.randn(clean.shape, generator=generator)).round().clamp(0, 255).byte()
    found[::3] = torch.randint(0, 256, found[::3].shape, generator=generator, dtype=torch.uint8)
    return found


def useless(source: Source) -> Document:
    """Add an expert that is the base and a random vector, in each tensor as long as the others' mean."""
    vectors, generator = source.benchmark.models.vectors, torch.Generator().manual_seed(USELESS_SEED)
    state = vectors.base_state()
    for name, block in vectors.blocks.items():
        length = block.dense().reshape(len(vectors.tasks), -1).norm(dim=1).mean()
        direction = torch.randn(state[name].shape, generator=generator)
        state[name] = state[name] + (length * direction / direction.norm()).to(state[name].dtype)
    path = source.folder / "useless.safetensors"
    save_tensors(vectors.with_aliases(state), path)
    return source.with_expert("useless", str(path))


def duplicate(source: Source) -> Document:
    """Add the first expert once more."""
    first = source.adapting[0]
    return source.with_expert(f"{first}_again", str(source.document["model"]["experts"][first]))


def foreign(source: Source) -> Document:
    """Take the last task's images away; its expert stays in the merge."""
    document = source.variant()
    document["data"]["tasks"].pop(source.adapting[-1])
    return document


def write_images(
    path: Path, images: Tensor, labels: Tensor | None = None, columns: tuple[str, str] = ("image", "label")
) -> None:
    """Write uint8 images losslessly, and labels if there are any, as a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "png")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    with atomic_file(path) as file:
        known = {} if labels is None else {columns[1]: labels.tolist()}
        parquet.write_table(pyarrow.table({columns[0]: encoded, **known}), file)


def steps_of(method: str) -> int:
    """Give how many steps a method's file takes; 0 where it learns nothing."""
    file = method_file(method)
    document = yaml.safe_load(file.read_text(encoding="utf-8")) if file else {"trainer": {"max_steps": 0}}
    return document.get("trainer", {}).get("max_steps", 500)
