"""Makes the shipped zoo: a small CLIP, one expert per embedded task, and the manifest.

    python scripts/train_zoo.py --out adamerge/zoo

With `--tasks` and `--pretrain` it makes a zoo of other image tasks instead; see `suite_zoo.py`.

1. Base: an open_clip model (patch ViT and text transformer) learns to match rendered glyphs,
   words and surfaces with captions (`adamerge.data.embedded.pretraining`); no image of the tasks
   is among them. Rows of the token embedding that no caption uses are set to zero, then all
   weights are rounded to fp16.
2. Experts: for each task the image tower of the rounded base is fine-tuned for a few steps with
   the task's zero-shot head frozen, so that it stays near the base; rounded to fp16.
3. Manifest: digests, recipe and accuracies, measured on the stored weights.

A finished base or expert in the output folder is kept, so an interrupted run goes on where it
stopped; delete the folder to begin anew. With the default arguments the run is deterministic on
one kind of processor (about 20 minutes on one core); another number of threads, another processor
or an accelerator sums in another order and gives weights that differ in their last bits. Steps,
rates and sizes were chosen on the tasks' validation parts.
"""

import argparse
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)
from torch.utils.data import DataLoader, IterableDataset

from adamerge.data.embedded import EMBEDDED_TASKS, SPLITS, EmbeddedTask, load_split
from adamerge.data.embedded.pretraining import CONCEPTS, Concept, draw_batch

MODEL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 28,
        "layers": 3,
        "width": 96,
        "head_width": 32,
        "patch_size": 7,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 48,
        "heads": 3,
        "layers": 2,
    },
}
PREPROCESS = {
    "size": 28,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
PACKAGES = (
    "torch",
    "open_clip_torch",
    "pytorch-lightning",
    "numpy",
    "pillow",
    "matplotlib",
    "mlxtend",
    "scikit-learn",
    "scikit-image",
)
LARGEST_SCALE = 100.0  # of the logits, as in CLIP


@dataclass(frozen=True)
class Recipe:
    """All constants of training; `steps` are optimiser steps, `batch` images per step."""

    seed: int = 0
    base_steps: int = 7000
    base_batch: int = 128
    base_lr: float = 2e-3
    base_decay: float = 0.05
    base_warmup: int = 200
    expert_steps: int = 120
    expert_batch: int = 64
    expert_lr: float = 1e-4
    expert_warmup: int = 10


class Stream(IterableDataset):
    """Batches of captioned drawings: normalised images and indices of concepts."""

    def __init__(self, seed: int, batch: int) -> None:
        self.seed, self.batch = seed, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = np.random.default_rng([self.seed, 1])
        while True:
            drawn = draw_batch(random, self.batch)
            yield normalised(torch.from_numpy(drawn.images)), torch.from_numpy(drawn.labels)


class Resampled(IterableDataset):
    """Endless random batches from one labelled set."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, seed: int) -> None:
        self.images, self.labels, self.batch, self.seed = images, labels, batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            chosen = torch.randint(len(self.images), (self.batch,), generator=generator)
            yield self.images[chosen], self.labels[chosen]


class Scheduled(pl.LightningModule):
    """AdamW with a linear warm-up and a cosine down to zero."""

    def __init__(self, trained: nn.Module, lr: float, decay: float, warmup: int) -> None:
        super().__init__()
        self.trained, self.lr, self.decay, self.warmup = trained, lr, decay, warmup

    def configure_optimizers(self) -> dict:
        """Gives the optimizer and its schedule, which counts steps."""
        optimizer = torch.optim.AdamW(
            self.trained.parameters(), self.lr, betas=(0.9, 0.98), weight_decay=self.decay
        )
        total = self.trainer.max_steps

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / total))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Pretraining(Scheduled):
    """Contrasts each image of a batch with a caption of every concept, and back."""

    def __init__(self, model: open_clip.CLIP, recipe: Recipe) -> None:
        super().__init__(model, recipe.base_lr, recipe.base_decay, recipe.base_warmup)
        self.model = model
        tokens = [tokenizer()(captions(concept)) for concept in CONCEPTS]
        self.register_buffer("tokens", torch.stack(tokens), persistent=False)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Gives the mean of both directions' cross entropies."""
        images, concepts = batch
        wording = torch.randint(self.tokens.shape[1], (len(self.tokens),), device=self.device)
        prompts = self.tokens[torch.arange(len(self.tokens), device=self.device), wording]
        texts = self.model.encode_text(prompts, normalize=True)
        logits = scale(self.model) * self.model.encode_image(images, normalize=True) @ texts.T
        loss = (F.cross_entropy(logits, concepts) + captions_to_images(logits, concepts)) / 2
        if index % 250 == 0:
            print(f"base: step {index}, loss {loss.item():.3f}", flush=True)
        return loss


class FineTuning(Scheduled):
    """Classifies with the frozen zero-shot head; only the image tower learns."""

    def __init__(self, visual: nn.Module, head: Tensor, recipe: Recipe) -> None:
        super().__init__(visual, recipe.expert_lr, 0.0, recipe.expert_warmup)
        self.visual = visual
        self.register_buffer("head", head, persistent=False)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Gives the cross entropy of the frozen head."""
        images, labels = batch
        return F.cross_entropy(F.normalize(self.visual(images), dim=-1) @ self.head, labels)


def captions(concept: Concept) -> list[str]:
    """All wordings of one concept."""
    return [template.format(concept.words) for template in concept.templates]


def captions_to_images(logits: Tensor, concepts: Tensor) -> Tensor:
    """Mean cross entropy from each caption that is in the batch to its images."""
    shown = F.one_hot(concepts, logits.shape[1]).to(logits.dtype)
    count = shown.sum(dim=0)
    per_concept = -(shown * F.log_softmax(logits, dim=0)).sum(dim=0)[count > 0] / count[count > 0]
    return per_concept.mean()


def normalised(images: Tensor) -> Tensor:
    """Bytes to the value range that `PREPROCESS` describes."""
    return (images.float() / 255 - 0.5) / 0.5


@cache
def tokenizer() -> open_clip.SimpleTokenizer:
    """The byte-pair vocabulary of open_clip, with the text tower's context length."""
    return open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])


def scale(model: open_clip.CLIP) -> Tensor:
    """What the cosines are multiplied by."""
    return model.logit_scale.exp().clamp(max=LARGEST_SCALE)


@torch.no_grad()
def zero_shot_head(model: open_clip.CLIP, task: EmbeddedTask) -> Tensor:
    """Scaled class vectors, [feature, class]: the mean over the templates of each class."""
    wordings = [[template.format(words) for template in task.templates] for words in task.classes]
    encoded = [model.encode_text(tokenizer()(texts), normalize=True) for texts in wordings]
    means = torch.stack([features.mean(dim=0) for features in encoded])
    return (F.normalize(means, dim=-1) * scale(model)).T.contiguous()


@torch.no_grad()
def accuracy(visual: nn.Module, head: Tensor, task: str, split: str) -> float:
    """Top-1 accuracy in percent."""
    images, labels = load_split(task, split)
    guessed = (F.normalize(visual(normalised(images)), dim=-1) @ head).argmax(dim=-1)
    return round(100 * (guessed == labels).double().mean().item(), 2)


def train(module: Scheduled, batches: IterableDataset, steps: int, accelerator: str) -> None:
    """Runs Lightning without any files, bars or loggers."""
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    module.cpu().eval()


def forget_unused_tokens(model: open_clip.CLIP) -> None:
    """Zeroes the embedding rows that no caption ever used, so that the file compresses well."""
    used = torch.cat([tokenizer()(captions(concept)).flatten() for concept in CONCEPTS]).unique()
    keep = torch.zeros(model.token_embedding.num_embeddings, 1)
    keep[used] = 1.0
    with torch.no_grad():
        model.token_embedding.weight.mul_(keep)


def store(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes fp16 safetensors under a temporary name first, so that a file is never partial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, partial)
    partial.chmod(0o644)
    partial.replace(path)


def write_json(content: dict, path: Path) -> None:
    """Writes indented JSON that everybody may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    path.chmod(0o644)


def make_base(out: Path, recipe: Recipe, accelerator: str) -> None:
    """Pre-trains the CLIP unless its weights are there."""
    write_json({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, out / "base" / "open_clip_config.json")
    weights = out / "base" / "open_clip_model.safetensors"
    if weights.is_file():
        return print(f"base: kept {weights}")
    pl.seed_everything(recipe.seed, verbose=False)
    model = open_clip.CLIP(**MODEL)
    stream = Stream(recipe.seed, recipe.base_batch)
    train(Pretraining(model, recipe), stream, recipe.base_steps, accelerator)
    forget_unused_tokens(model)
    store(model.state_dict(), weights)


def stored_base(out: Path) -> open_clip.CLIP:
    """The rounded base, read as anybody else would read it."""
    return open_clip.create_model(f"local-dir:{out / 'base'}").eval()


def make_expert(out: Path, task: EmbeddedTask, recipe: Recipe, accelerator: str) -> None:
    """Fine-tunes the image tower for one task unless its weights are there."""
    weights = out / "experts" / f"{task.name}.safetensors"
    if weights.is_file():
        return print(f"{task.name}: kept {weights}")
    model = stored_base(out)
    images, labels = load_split(task.name, "train")
    batches = Resampled(normalised(images), labels, recipe.expert_batch, recipe.seed)
    module = FineTuning(model.visual.train(), zero_shot_head(model, task), recipe)
    train(module, batches, recipe.expert_steps, accelerator)
    store({f"visual.{key}": value for key, value in module.visual.state_dict().items()}, weights)


def measured(out: Path, task: EmbeddedTask) -> dict:
    """Accuracies of base and expert, and what the task consists of."""
    model = stored_base(out)
    head = zero_shot_head(model, task)
    parts = ("validation", "test")
    zero_shot = {split: accuracy(model.visual, head, task.name, split) for split in parts}
    model.load_state_dict(load_file(out / "experts" / f"{task.name}.safetensors"), strict=False)
    expert = {split: accuracy(model.visual, head, task.name, split) for split in parts}
    print(f"{task.name}: zero-shot {zero_shot}, expert {expert}", flush=True)
    images = {split: load_split(task.name, split)[0] for split in SPLITS}
    return {
        "classes": list(task.classes),
        "sizes": {split: len(pixels) for split, pixels in images.items()},
        "images_sha256": {split: digest(pixels.numpy().tobytes()) for split, pixels in images.items()},
        "accuracy": {"zero_shot": zero_shot, "expert": expert},
    }


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return sha256(content).hexdigest()


def described(root: Path, files: list[Path]) -> dict[str, dict]:
    """Sizes and digests of files, by their path below a folder."""
    return {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": digest(path.read_bytes()),
        }
        for path in files
    }


def make_manifest(out: Path, recipe: Recipe, tasks: list[EmbeddedTask]) -> None:
    """Describes every file of the finished zoo."""
    files = [*sorted(out.glob("base/*.*")), *sorted(out.glob("experts/*.safetensors"))]
    manifest = {
        "schema_version": 1,
        "seed": recipe.seed,
        "recipe": {**asdict(recipe), "model": MODEL, "concepts": len(CONCEPTS)},
        "files": described(out, files),
        "tasks": {task.name: measured(out, task) for task in tasks},
        "versions": {package: version(package) for package in PACKAGES},
    }
    write_json(manifest, out / "manifest.json")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the zoo that adamerge ships.")
    parser.add_argument("--out", type=Path, help="output folder; default: the shipped zoo's")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; changes last bits")
    parser.add_argument("--accelerator", default="cpu", help="Lightning's name: cpu, gpu, auto")
    parser.add_argument("--quick", action="store_true", help="a few steps, two tasks: a trial")
    parser.add_argument("--tasks", type=Path, help="folder of image tasks: a zoo for these instead")
    parser.add_argument("--pretrain", type=Path, help="folder of generic photos for that zoo's base")
    options = parser.parse_args(arguments)
    if (options.tasks is None) != (options.pretrain is None):
        parser.error("--tasks and --pretrain go together")
    if options.tasks and not options.out:
        parser.error("--tasks needs --out: a folder outside the package")
    options.out = options.out or Path("adamerge/zoo")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Makes what is missing in the output folder, and the manifest."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    # One process draws the images faster than it could hand them over.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    if options.tasks:
        # Here, because the suite's script builds on this one.
        from suite_zoo import make_suite

        return make_suite(options)
    recipe = Recipe(seed=options.seed)
    tasks = list(EMBEDDED_TASKS.values())
    if options.quick:
        tasks = tasks[:2]
        recipe = replace(recipe, base_steps=4, base_batch=16, expert_steps=2, expert_batch=8)
    make_base(options.out, recipe, options.accelerator)
    for task in tasks:
        make_expert(options.out, task, recipe, options.accelerator)
    make_manifest(options.out, recipe, tasks)


if __name__ == "__main__":
    main()
