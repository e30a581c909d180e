"""Makes a zoo for a folder of image tasks, outside the package: `train_zoo.py --tasks ... --pretrain ...`.

1. Base: the image tower of an open_clip model learns to classify generic photos with a temporary head.
   Its text tower stays random: heads are files.
2. Heads: multinomial logistic regression on the frozen base's features of each task's training images.
3. Experts: for each task the image tower of the base is fine-tuned with the task's frozen head.
4. Adaptation images: a part of each training split that neither heads nor experts see, without labels.
5. Benchmark file and manifest.

As in `train_zoo.py`, what is finished is kept, so an interrupted run goes on where it stopped.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from zlib import crc32

import open_clip
import pytorch_lightning as pl
import torch
import train_zoo as zoo
import yaml
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from adamerge import Head, OpenClipBackbone
from adamerge.atomic import write_text
from adamerge.data.datasets import Images, load_images

SIZE = 32
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 6, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
}
RECIPE = zoo.Recipe(base_steps=3800, base_lr=1e-3, expert_steps=900, expert_lr=5e-4, expert_warmup=50)
QUICK = {"base_steps": 4, "base_batch": 8, "base_warmup": 1, "expert_steps": 2, "expert_batch": 8}
PADDING = {"base": 4, "expert": 2}  # pixels by which a training image is shifted at most
SCALE = 30.0  # of the unit features that a classifier is fitted on
DECAY = 3e-4  # of the logistic regression, times half the squared norm
ADAPTATION = 640  # images a task, at most a quarter of its training split
PACKAGES = ("torch", "open_clip_torch", "pytorch-lightning", "pillow", "pyarrow")


class Shifted(zoo.Resampled):
    """Endless random batches of shifted, and if wanted mirrored, images; normalised."""

    def __init__(self, images: Images, batch: int, seed: int, padding: int, mirror: bool) -> None:
        super().__init__(images.images, images.labels, batch, seed)
        self.padding, self.mirror = padding, mirror

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        for images, labels in super().__iter__():
            yield zoo.normalised(shifted(images, self.padding, self.mirror, generator)), labels


class Classifying(zoo.Scheduled):
    """Classifies generic photos with a temporary head on unit features."""

    def __init__(self, visual: nn.Module, classes: int, recipe: zoo.Recipe) -> None:
        head = nn.Linear(MODEL["embed_dim"], classes)
        parts = nn.ModuleList([visual, head])
        super().__init__(parts, recipe.base_lr, recipe.base_decay, recipe.base_warmup)
        self.visual, self.head = visual, head

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Gives the cross entropy."""
        images, labels = batch
        logits = self.head(SCALE * F.normalize(self.visual(images), dim=-1))
        loss = F.cross_entropy(logits, labels)
        if index % 100 == 0:
            right = (logits.argmax(-1) == labels).double().mean()
            print(f"base: step {index}, loss {loss.item():.3f}, right {right:.2f}", flush=True)
        return loss


@dataclass(frozen=True)
class Task:
    """One task: its class names in label order, its folder, the zoo's folder, the seed of its split."""

    name: str
    classes: list[str]
    source: Path
    out: Path
    seed: int

    def file(self, part: str) -> Path:
        """Names a file of the zoo: "heads", "experts" or "adapt"."""
        return self.out / part / f"{self.name}.{'parquet' if part == 'adapt' else 'safetensors'}"

    @cached_property
    def order(self) -> Tensor:
        """A random order of the training split: adaptation images come first."""
        rows = parquet.read_metadata(self.source / "train.parquet").num_rows
        generator = torch.Generator().manual_seed(crc32(f"{self.seed}/{self.name}".encode()))
        return torch.randperm(rows, generator=generator)

    @property
    def n_adaptation(self) -> int:
        """Number of adaptation images."""
        return min(ADAPTATION, len(self.order) // 4)

    @cached_property
    def train(self) -> Images:
        """The labelled training images without the adaptation images."""
        images = read(self.out, self.source / "train.parquet")
        if len(images) != len(self.order):
            raise SystemExit(f"{self.source}: some images cannot be decoded; remove them first.")
        return images.part(self.order[self.n_adaptation :])


def shifted(images: Tensor, padding: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """Crops each image, [image, channel, y, x], out of its padded self at a random place."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    y, x = top + torch.arange(height), left + torch.arange(width)
    if mirror:
        x = torch.where(torch.rand(count, 1, generator=generator) < 0.5, x.flip(1), x)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    cropped = padded[torch.arange(count)[:, None, None], y[:, :, None], x[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


def read(out: Path, source: Path) -> Images:
    """Labelled images as the zoo's base sees them."""
    preprocess = OpenClipBackbone(out / "base").preprocess
    return load_images(str(source), preprocess, labelled=True, role=str(source))


@torch.no_grad()
def features(visual: nn.Module, images: Images) -> Tensor:
    """Unit features, [image, dim]."""
    return torch.cat([F.normalize(visual(zoo.normalised(x)), dim=-1) for x in images.images.split(500)])


def probe(inputs: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Logistic regression without bias on scaled unit features: weights [class, dim] for unit features."""
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(SCALE * inputs @ weight.T, labels) + DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return SCALE * weight.detach()


def make_base(out: Path, photos: Path, recipe: zoo.Recipe, accelerator: str) -> None:
    """Pre-trains the image tower unless its weights are there."""
    config = {"model_cfg": MODEL, "preprocess_cfg": zoo.PREPROCESS | {"size": SIZE}}
    zoo.write_json(config, out / "base" / "open_clip_config.json")
    weights = out / "base" / "open_clip_model.safetensors"
    if weights.is_file():
        return print(f"base: kept {weights}")
    images = read(out, photos)
    pl.seed_everything(recipe.seed, verbose=False)
    model = open_clip.CLIP(**MODEL)
    module = Classifying(model.visual, int(images.labels.max()) + 1, recipe)
    batches = Shifted(images, recipe.base_batch, recipe.seed, PADDING["base"], mirror=True)
    zoo.train(module, batches, recipe.base_steps, accelerator)
    zoo.store(model.state_dict(), weights)


def make_adaptation(task: Task) -> None:
    """Copies the adaptation images as they are, without labels."""
    rows = parquet.read_table(task.source / "train.parquet", columns=["image"])
    chosen = rows.take(task.order[: task.n_adaptation].tolist())
    path = task.file("adapt")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(chosen.replace_schema_metadata(None), path)


def make_head(task: Task) -> None:
    """Fits the head unless it is there."""
    if task.file("heads").is_file():
        return print(f"{task.name}: kept {task.file('heads')}")
    inputs = features(zoo.stored_base(task.out).visual, task.train)
    zoo.store({"weight": probe(inputs, task.train.labels, len(task.classes))}, task.file("heads"))


def make_expert(task: Task, recipe: zoo.Recipe, accelerator: str) -> None:
    """Fine-tunes the image tower unless its weights are there."""
    if task.file("experts").is_file():
        return print(f"{task.name}: kept {task.file('experts')}")
    visual = zoo.stored_base(task.out).visual.train()
    module = zoo.FineTuning(visual, Head.from_file(task.file("heads")).weight.T, recipe)
    batches = Shifted(task.train, recipe.expert_batch, recipe.seed, PADDING["expert"], mirror=False)
    zoo.train(module, batches, recipe.expert_steps, accelerator)
    weights = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    zoo.store(weights, task.file("experts"))


def measured(task: Task) -> dict:
    """Accuracies in percent on the test split, and the expert's relative distance from the base."""
    head, test = Head.from_file(task.file("heads")), read(task.out, task.source / "test.parquet")
    base, expert = zoo.stored_base(task.out).visual, zoo.stored_base(task.out)
    expert.load_state_dict(load_file(task.file("experts")), strict=False)
    found = {}
    for name, visual in (("zero_shot", base), ("expert", expert.visual)):
        right = head.logits(features(visual, test)).argmax(-1) == test.labels
        found[name] = round(100 * right.double().mean().item(), 2)
    before, after = (nn.utils.parameters_to_vector(v.parameters()) for v in (base, expert.visual))
    distance = round(((after - before).norm() / before.norm()).item(), 4)
    print(f"{task.name}: {found}, distance {distance}", flush=True)
    sizes = {"train": len(task.order) - task.n_adaptation, "adapt": task.n_adaptation, "test": len(test)}
    return {"classes": task.classes, "sizes": sizes, "accuracy": found, "distance": distance}


def write_benchmark(out: Path, tasks: list[Task]) -> None:
    """Writes the files that `adamerge bench run` reads.

    ``benchmark.yaml`` adapts on images that no expert was trained on; ``benchmark_train.yaml`` on the whole
    training split, as the CLIP benchmarks do by default; labels are dropped when it is loaded.
    """
    rows = {
        task.name: {
            "adapt": str(task.file("adapt")),
            "test": str(task.source / "test.parquet"),
            "classes": task.classes,
            "head": str(task.file("heads")),
        }
        for task in tasks
    }
    experts = {task.name: str(task.file("experts")) for task in tasks}
    document = {
        "model": {"base": str(out / "base"), "experts": experts},
        "data": {"batch_size": 16, "holdout": 0.1, "tasks": rows},
    }
    write_text(out / "benchmark.yaml", yaml.safe_dump(document, sort_keys=False))
    for task in tasks:
        rows[task.name]["adapt"] = str(task.source / "train.parquet")
    write_text(out / "benchmark_train.yaml", yaml.safe_dump(document, sort_keys=False))


def make_suite(options: argparse.Namespace) -> None:
    """Makes what is missing, then the benchmark file and the manifest."""
    folder, photos, out = (path.resolve() for path in (options.tasks, options.pretrain, options.out))
    recipe = replace(RECIPE, seed=options.seed, **(QUICK if options.quick else {}))
    listed = json.loads((folder / "tasks.json").read_text())
    tasks = [Task(name, row["classes"], folder / name, out, recipe.seed) for name, row in listed.items()]
    make_base(out, photos, recipe, options.accelerator)
    facts = {}
    for task in tasks:
        make_adaptation(task)
        make_head(task)
        make_expert(task, recipe, options.accelerator)
        facts[task.name] = measured(task)
    write_benchmark(out, tasks)
    manifest = {
        "schema_version": 1,
        "recipe": asdict(recipe) | {"padding": PADDING, "scale": SCALE, "decay": DECAY, "model": MODEL},
        "files": zoo.described(out, sorted(out.glob("*/*.*"))),
        "tasks_files": zoo.described(folder, sorted(folder.glob("*/*.parquet"))),
        "pretrain_files": zoo.described(photos, sorted(photos.glob("*.parquet"))),
        "tasks": facts,
        "versions": {package: version(package) for package in PACKAGES},
    }
    zoo.write_json(manifest, out / "manifest.json")
