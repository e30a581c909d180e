"""Mixtures of a tiny CLIP's experts, of every routing and codec."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from conftest import CLASSES, SIZE, TASKS, nudge
from torch import Tensor
from torch.nn import functional

from adamerge.checkpoints import open_checkpoint
from adamerge.coefficients import Oracle, Router, Routing, Subspace, Uniform
from adamerge.mixture import Mixture
from adamerge.models import Head, OpenClipBackbone
from adamerge.vectors import BernoulliCodec, Codec, LowRankCodec, MagnitudeCodec, TaskVectors, rebase

FULL = LowRankCodec(fraction=1.0, kernels=True)
CODECS: dict[str, str | Codec] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "ternary": "ternary",
    "low_rank": LowRankCodec(rank=3),
    "low_rank of kernels, bf16": LowRankCodec(fraction=0.5, kernels=True, dtype="bf16"),
    "magnitude": MagnitudeCodec(0.2),
    "bernoulli": BernoulliCodec(0.5),
}
ROUTINGS: dict[str, Callable[[], Routing]] = {
    "twin": lambda: Router("paper"),
    "linear": lambda: Router("linear"),
    "top 1": lambda: Router("linear", select="top_1"),
    "top k": lambda: Router("linear", select="top_k", k=2, renormalize=True),
    "top p": lambda: Router("linear", select="top_p", p=0.4),
    "wemoe": lambda: Router("mlp", "block", select="none", initial=0.3, groups=r"\.mlp\."),
    "shared gate": lambda: Router("linear", "block", groups=r"\.mlp\.", shared=True),
    "gates of attention": lambda: Router("linear", "block", groups=r"\.attn\."),
    "smile": lambda: Subspace(top_k=2),
    "oracle": Oracle,
    "uniform": Uniform,
}
COMBINED = [  # SMILE reads low-rank factors
    (name, codec) for name in ROUTINGS for codec in CODECS if name != "smile" or codec.startswith("low_rank")
]


@cache
def backbone_of(clip: Path) -> OpenClipBackbone:
    return OpenClipBackbone(clip / "base")


@cache
def vectors_of(clip: Path, n_tasks: int = len(TASKS), exclude: tuple[str, ...] = ()) -> TaskVectors:
    """Experts that differ enough for different predictions."""
    base = dict(open_checkpoint(clip / "base"))
    experts = {task: nudge(base, seed, 0.1) for seed, task in enumerate(TASKS[:n_tasks], 1)}
    names = set(backbone_of(clip).names)
    options = {"names": names, "allow_missing": ["*"], "exclude": exclude, "force": True}
    return TaskVectors.open(clip / "base", experts, **options)


def heads_of(n_tasks: int = len(TASKS)) -> dict[str, Head]:
    """CLIP-like heads, and one that has a bias and reads features as they are."""
    generator = torch.Generator().manual_seed(0)
    heads = {}
    for task in TASKS[:n_tasks]:
        weight = torch.randn(len(CLASSES[task]), 12, generator=generator)
        heads[task] = Head(10 * functional.normalize(weight, dim=-1))
    last = heads[TASKS[n_tasks - 1]].weight
    return heads | {TASKS[n_tasks - 1]: Head(last, torch.linspace(0, 1, len(last)), normalize=False)}


def average(vectors: TaskVectors, scale: float = 0.3) -> dict[str, Tensor]:
    """Task arithmetic."""
    return vectors.merge(vectors.uniform(scale))


_split: dict[tuple[int, str], TaskVectors] = {}


def split(vectors: TaskVectors, codec: str | Codec) -> TaskVectors:
    """Rebase on task arithmetic, once for each of the cached vectors."""
    key = id(vectors), codec if isinstance(codec, str) else codec.name
    if key not in _split:
        _split[key] = rebase(vectors, average(vectors), codec)
    return _split[key]


def make_mixture(
    clip: Path,
    routing: Routing | None,
    codec: str | Codec = FULL,
    *,
    shared: Mapping[str, Tensor] | None = None,
    n_tasks: int = len(TASKS),
    exclude: tuple[str, ...] = (),
) -> Mixture:
    """Split the experts into a shared model and exclusive parts, in evaluation mode."""
    vectors = vectors_of(clip, n_tasks, exclude)
    exclusive = split(vectors, codec) if shared is None else rebase(vectors, shared, codec)
    heads = heads_of(n_tasks)
    classes = {task: CLASSES[task] for task in heads}
    return Mixture(exclusive, backbone_of(clip), heads, routing, classes).eval()


def uint8_images(count: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def literal(mixture: Mixture, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Merge a model for every image and run it alone; by name, ``[image, task]``, others are shared."""
    vectors, shared = mixture.vectors, mixture.vectors.base_state()
    rows = []
    for i, image in enumerate(images):
        none = torch.zeros(len(vectors.tasks))
        columns = [weights[name][i] if name in weights else none for name in vectors.names]
        rows.append(mixture.backbone.features(shared | vectors.merge(torch.stack(columns, 1)), image[None]))
    return torch.cat(rows)
