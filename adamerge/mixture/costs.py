"""What a mixture costs: stored numbers and bytes, and time per batch."""

import time
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from adamerge.mixture.model import Mixture
from adamerge.vectors import Size, storage


def stored(mixture: Mixture) -> dict[str, Size]:
    """Count what is stored: of the shared model what the backbone reads, experts, router, heads."""
    read = {name: block for name, block in mixture.vectors.blocks.items() if name in mixture.routed}
    sizes = storage(replace(mixture.vectors, blocks=read, rest={}))
    del sizes["base"], sizes["rest"]
    shared = [mixture.shared[name] for name in mixture.backbone.names]
    router = [] if mixture.routing is None else [*mixture.routing.state_dict().values()]
    heads = [x for head in mixture.heads.values() for x in head.tensors.values()]
    parts = {"shared": shared, "router": router, "heads": heads}
    experts = {f"experts' {part}": size for part, size in sizes.items()}
    return {part: Size.of(tensors) for part, tensors in parts.items()} | experts


@torch.no_grad()
def latency(mixture: Mixture, images: Tensor, repeats: int = 3) -> dict[str, float]:
    """Time a batch: seconds of the shared model alone, and of router and mixture; medians."""
    images, task = mixture.batch(images), next(iter(mixture.heads))
    functions = {
        "shared": lambda: mixture.backbone.features(mixture.shared, images),
        "mixture": lambda: mixture.features(images, mixture.gates(images, task)),
    }
    taken: dict[str, list[float]] = {name: [] for name in functions}
    with mixture.evaluating():
        for name, function in [*functions.items()] * (repeats + 1):
            began = time.perf_counter()
            function()[0, 0].item()  # waits for a GPU
            taken[name].append(time.perf_counter() - began)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}
