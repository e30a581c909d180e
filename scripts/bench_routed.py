"""Measures a batch of different mixtures beside the static model and beside merging for every image.

    python scripts/bench_routed.py --model vit-b-32 --rank 0.1 --threads 1 --json
    python scripts/bench_routed.py --model suite --rank 0.02 --repeats 50 --json

Images per second (`..._img_s`) of ways to run one batch, by turns in one process; medians of --repeats:

- `static`: the backbone with ordinary merged weights;
- `routed`: every image under its own mixture, random and soft (no two are equal), in one pass;
- `per_sample`: `TaskVectors.merge`, then the backbone, for one image after another;
- `expanding`: the same loop as published code has it: every expert's vectors are expanded, then summed;
- `with_router`: `Mixture.predict`: the shared model's pass that the router reads, the router, the routed
  pass, all heads.

The two loops run over the first --loop images of the batch only. `..._cpu` ratios are of processor time,
which other processes do not add to. `max_abs_diff` is the largest difference between features of `routed`
and of a loop; `spread`, between `routed` and `static`, tells what mixtures do. Weights and images are random,
but for --model zoo. `peak_rss_mib` is of the whole process while it measures, libraries and vectors included;
`..._mib` is what the first run of a way needed beyond what was resident before.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import bench_step as step
import torch
from torch import Tensor
from torch.nn import functional

from adamerge.coefficients import Router
from adamerge.mixture import Gates, Mixture
from adamerge.models import Head
from adamerge.state import State
from adamerge.vectors import BernoulliCodec, Block, Codec, LowRankBlock, LowRankCodec, MagnitudeCodec, rebase
from adamerge.vectors.sparse import kept_count
from adamerge.vectors.store import CODECS

SUITE = dict(zip(step.SHAPE, (32, 8, 128, 6, 4, 4.0, 128), strict=True))
TOWERS = {"vit-b-32": step.VIT_B_32, "suite": SUITE, "tiny": step.TINY}
BY_SHARE: dict[str, Callable[[float], Codec]] = {
    "low_rank": LowRankCodec,
    "magnitude": MagnitudeCodec,
    "bernoulli": BernoulliCodec,
}
NOISE = 1e-3  # standard deviation of random vectors' entries
LOOPS = ("per_sample", "expanding")
WAYS = ("static", "routed", *LOOPS, "with_router")
SHARED = 0.3  # the zoo's shared model is task arithmetic with this coefficient


def codec_of(args: argparse.Namespace) -> Codec:
    """Give the codec of the exclusive experts; `--rank` is the share that it keeps, if it keeps one."""
    return BY_SHARE[args.codec](args.rank) if args.codec in BY_SHARE else CODECS[args.codec]()


def zoo_exclusives(args: argparse.Namespace) -> step.Opened:
    """Split the shipped zoo's experts into a shared model and exclusive experts."""
    vectors, backbone, size = step.zoo_experts(args.experts, "fp32")
    return rebase(vectors, vectors.merge(vectors.uniform(SHARED)), codec_of(args)), backbone, size


def random_exclusives(args: argparse.Namespace) -> step.Opened:
    """Make a random image tower as shared model, and random exclusive experts."""
    vectors, backbone, size = step.random_experts(TOWERS[args.model], 1, "bf16")
    blocks = {name: random_block(block.base_tensor(), args) for name, block in vectors.blocks.items()}
    tasks = tuple(f"task{i}" for i in range(args.experts))
    return dataclasses.replace(vectors, tasks=tasks, blocks=blocks, codec=codec_of(args)), backbone, size


def random_block(base: Tensor, args: argparse.Namespace) -> Block:
    """Make random vectors; low-rank ones from random factors, because decomposing many takes minutes."""
    if args.codec != "low_rank" or base.dim() != 2:
        return codec_of(args).encode(base, NOISE * torch.randn(args.experts, *base.shape))
    rank = max(kept_count(args.rank, min(base.shape)), 1)
    left, right = (torch.randn(args.experts * rank, size) for size in base.shape)
    return LowRankBlock(base, NOISE / rank**0.5 * left, right, (rank,) * args.experts)


class Bench:
    """One batch of images, and the ways to run it."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        vectors, backbone, size = zoo_exclusives(args) if args.model == "zoo" else random_exclusives(args)
        dim = backbone.module.output_dim
        heads = {t: Head(100 * functional.normalize(torch.randn(step.N_CLASSES, dim))) for t in vectors.tasks}
        self.mixture = Mixture(vectors, backbone, heads, Router("linear")).eval().to(args.device)
        self.vectors, self.backbone = self.mixture.vectors, self.mixture.backbone
        pixels = torch.randint(256, (args.batch, 3, size, size), dtype=torch.uint8)
        self.images = pixels.to(args.device)
        self.weights = torch.randn(args.batch, args.experts).softmax(-1).to(args.device)
        self.merged = self.vectors.merge(self.vectors.uniform(1 / args.experts).to(args.device))
        self.n_loop = min(args.loop, args.batch)

    def static(self) -> Tensor:
        """Run the batch under one merged model."""
        return self.backbone.features(self.merged, self.images)

    def routed(self) -> Tensor:
        """Run the batch in one pass, every image under its own mixture."""
        assert self.mixture.routing is not None  # it was given
        gates = Gates(self.mixture.routing, len(self.images))
        gates.known[""] = self.weights
        return self.mixture.features(self.images, gates)

    def per_sample(self) -> Tensor:
        """Merge and run for one image after another."""
        columns = len(self.vectors.names)
        return self._loop(lambda weights: self.vectors.merge(weights[:, None].expand(-1, columns)))

    def expanding(self) -> Tensor:
        """Expand, sum and run for one image after another."""
        blocks = self.vectors.blocks.items()
        return self._loop(
            lambda weights: {n: b.base_tensor() + torch.tensordot(weights, b.dense(), 1) for n, b in blocks}
        )

    def _loop(self, merged: Callable[[Tensor], State]) -> Tensor:
        pairs = zip(self.images[: self.n_loop], self.weights[: self.n_loop], strict=True)
        return torch.cat([self.backbone.features(merged(weights), image[None]) for image, weights in pairs])

    def with_router(self) -> Tensor:
        """Predict as users do."""
        return self.mixture.predict(self.images).probability


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all ways once, compare their results, then time them by turns."""
    bench = Bench(args)
    device = bench.images.device
    with step.autocast(device, args.precision):
        found = first_runs(bench)
        taken: dict[str, list[step.Taken]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, times in taken.items():
                times.append(step.timed(getattr(bench, way), device))
    found |= rates(taken, {way: bench.n_loop if way in LOOPS else args.batch for way in WAYS})
    stored = {"loop_images": bench.n_loop, "stored_bytes": bench.vectors.n_bytes}
    return found | stored | step.cuda_memory(device)


def first_runs(bench: Bench) -> dict[str, float]:
    """Run each way once, for memory and for differences of results."""
    found: dict[str, float] = {}
    features: dict[str, Tensor] = {}
    peak = 0.0
    for way in WAYS:
        step.reset_peak()
        before = step.memory("VmRSS")
        features[way] = getattr(bench, way)()
        found[f"{way}_mib"] = max(step.memory("VmHWM") - before, 0.0)
        peak = max(peak, step.memory("VmHWM"))
    found |= {"peak_rss_mib": peak, "spread": difference(features["routed"], features["static"])}
    return found | {"max_abs_diff": max(difference(features["routed"], features[way]) for way in LOOPS)}


def difference(a: Tensor, b: Tensor) -> float:
    """Give the largest difference between the features of the first images."""
    n = min(len(a), len(b))
    return (a[:n].float() - b[:n].float()).abs().max().item()


def rates(taken: dict[str, list[step.Taken]], images: dict[str, int]) -> dict[str, float]:
    """Give images per second, and how many times those of another way the routed pass takes."""
    wall = {way: images[way] / median(t.wall for t in times) for way, times in taken.items()}
    cpu = {way: images[way] / median(t.cpu for t in times) for way, times in taken.items()}
    found = {f"{way}_img_s": rate for way, rate in wall.items()}
    for way in ("static", *LOOPS):
        found[f"routed_over_{way}"] = wall["routed"] / wall[way]
        found[f"routed_over_{way}_cpu"] = cpu["routed"] / cpu[way]
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=[*TOWERS, "zoo"], default="suite")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--codec", choices=CODECS, default="low_rank")
    parser.add_argument("--rank", type=float, default=0.1, help="share of ranks, or of entries, that is kept")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--loop", type=int, default=4, help="images of the loops")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("32", "bf16-mixed"), default="32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    found = {name: value for name, value in vars(args).items() if name != "json"} | measure(args)
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
