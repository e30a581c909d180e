"""Measures what an adaptation step costs, against a floor that no step can beat.

    python scripts/bench_step.py --model zoo --experts 8 --images-per-task 16 --json
    python scripts/bench_step.py --model vit-b-32 --codec bf16 --memory --json

The step is the one that users run: MergeTask's training step, its backward and the optimizer. The floor
is a plain forward and backward of one model of the same architecture: same images, heads and loss, no
merge. Both run in one process, in turn; medians are reported. Merge and projection are timed alone too,
beside a copy of memory on the same device.

`--memory` instead measures peak memory, each setting in a process of its own, for steps that see the
images of 2, 4, ... tasks, against the budget: base + vectors + one gradient copy + the activations of one
task. The libraries' own memory is taken off. glibc's allocator keeps freed blocks below its moving mmap
threshold, so the threshold is fixed and reported.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from adamerge import Entropy, MergeTask, TaskVectors, zoo
from adamerge.checkpoints import open_checkpoint
from adamerge.models import Head, ModuleBackbone, OpenClipBackbone
from adamerge.vectors import DenseCodec
from adamerge.vectors.block import project
from adamerge.vectors.dense import CODEC_DTYPES

N_CLASSES = 10
MIB = 2**20
MMAP_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
PLAIN = 0  # as a number of tasks: the plain model, which shows what one task's activations need


class Setting(NamedTuple):
    """A model with its experts, and one step's images: uint8 ``[image, 3, size, size]`` per task."""

    task: MergeTask
    batch: dict[str, dict[str, Tensor]]
    device: torch.device


def zoo_experts(count: int, codec: str) -> tuple[TaskVectors, ModuleBackbone, int]:
    """Open the shipped zoo; where it has fewer experts than wanted, noisy copies are added."""
    backbone = OpenClipBackbone(zoo.base())
    base = open_checkpoint(zoo.base())
    base = {name: base[name] for name in backbone.names}
    experts = {}
    for i, path in enumerate(islice(cycle(zoo.experts().values()), count)):
        expert = open_checkpoint(path)
        noise = 0 if i < len(zoo.experts()) else 1e-3
        experts[f"task{i}"] = {n: t.float() + noise * torch.randn(t.shape) for n, t in expert.items()}
    return TaskVectors.open(base, experts, codec), backbone, backbone.module.image_size[0]


def random_experts(count: int, codec: str) -> tuple[TaskVectors, ModuleBackbone, int]:
    """Make a random ViT-B/32 image tower with experts that differ from it by noise."""
    module = VisionTransformer(224, 32, width=768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512)
    form = DenseCodec(CODEC_DTYPES[codec])
    state = module.state_dict()
    blocks = {n: form.encode(state[n], 1e-3 * torch.randn(count, *state[n].shape)) for n in sorted(state)}
    vectors = TaskVectors(tuple(f"task{i}" for i in range(count)), blocks, {}, form)
    return vectors, ModuleBackbone(module.to("meta"), mean=(0.5,) * 3, std=(0.25,) * 3), 224


MODELS = {"zoo": zoo_experts, "vit-b-32": random_experts}


def build(args: argparse.Namespace, tasks_in_step: int) -> Setting:
    """Make the task and a batch for the first tasks."""
    torch.manual_seed(0)
    vectors, backbone, size = MODELS[args.model](args.experts, args.codec)
    device = torch.device(args.device)
    dim = backbone.module.output_dim
    heads = {t: Head(100 * nn.functional.normalize(torch.randn(N_CLASSES, dim))) for t in vectors.tasks}
    task = MergeTask(vectors, backbone, heads, images_per_pass=args.images_per_task).to(device)
    task.on_fit_start()
    images = (args.images_per_task, 3, size, size)
    batch = {
        t: {"images": torch.randint(256, images, dtype=torch.uint8, device=device)}
        for t in vectors.tasks[:tasks_in_step]
    }
    return Setting(task, batch, device)


def adaptation_step(setting: Setting, precision: str) -> Callable[[], None]:
    """Give a function that takes one step as Lightning does."""
    task, batch, device = setting
    optimizer = task.configure_optimizers()

    def step() -> None:
        task.on_train_batch_start(batch, 0)
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = task.training_step(batch, 0)
        loss.backward()
        task.on_after_backward()
        optimizer.step()
        task.on_train_batch_end(loss, batch, 0)

    return step


def plain_step(setting: Setting, precision: str, *, accumulate: bool = False) -> Callable[[], None]:
    """Give a function that takes one plain model forward and backward, task by task."""
    task, batch, device = setting
    backbone = task.backbone
    model = copy.deepcopy(backbone.module).to_empty(device=device).requires_grad_()
    weights = task.weights(task.coefficients().detach())
    model.load_state_dict({n.removeprefix(backbone.prefix): w for n, w in weights.items()})
    objective = Entropy()

    def step() -> None:
        if not accumulate:
            model.zero_grad()
        with autocast(device, precision):
            for name, part in batch.items():
                images = (part["images"].float() / 255 - backbone.mean) / backbone.std
                objective(task.heads[name].logits(model(images)), name).backward()

    return step


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Do as Lightning does for this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def parts(setting: Setting) -> dict[str, Callable[[], Any]]:
    """Give merge, projection and a plain copy of memory, each alone."""
    task, _, device = setting
    matrix = task.coefficients().detach()
    blocks = [task.vectors.blocks[name] for name in task.read_names]
    gradients = [torch.randn(b.base_tensor().shape, device=device) for b in blocks]
    source = torch.zeros(2**26, device=device)
    target = torch.zeros_like(source)
    return {
        "merge": lambda: task.vectors.merge(matrix, task.read_names),
        "project": lambda: project(blocks, gradients),
        "copy": lambda: target.copy_(source),
    }


def bytes_moved(task: MergeTask) -> dict[str, int]:
    """Count the bytes that each part must read and write at least."""
    blocks = [task.vectors.blocks[name] for name in task.read_names]
    stored = sum(b.n_bytes for b in blocks)
    base = sum(b.base_tensor().nbytes for b in blocks)
    wide = 4 * n_parameters(task)
    return {"merge": stored + wide, "project": stored - base + wide, "copy": 2 * 4 * 2**26}


def n_parameters(task: MergeTask) -> int:
    """Count the parameters that a step merges."""
    return sum(task.vectors.blocks[name].base_tensor().numel() for name in task.read_names)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Give the seconds of one call, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    """Time floor, step and parts in turn."""
    setting = build(args, args.experts)
    functions = {
        "floor": plain_step(setting, args.precision),
        "step": adaptation_step(setting, args.precision),
        **parts(setting),
    }
    for function in functions.values():
        timed(function, setting.device)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(args.steps):
        for name, function in functions.items():
            seconds[name].append(timed(function, setting.device))
    return summary(seconds, bytes_moved(setting.task)) | cuda_memory(setting.device)


def summary(seconds: dict[str, list[float]], moved: dict[str, int]) -> dict[str, Any]:
    """Give medians, extremes and rates."""
    middle = {name: median(values) for name, values in seconds.items()}
    found: dict[str, Any] = {f"{name}_s": middle[name] for name in ("step", "floor", "merge", "project")}
    found["forward_backward_s"] = middle["step"] - middle["merge"] - middle["project"]
    found["ratio"] = middle["step"] / middle["floor"]
    found["ratio_of_minima"] = min(seconds["step"]) / min(seconds["floor"])
    for name in ("step", "floor"):
        found |= {f"{name}_min_s": min(seconds[name]), f"{name}_max_s": max(seconds[name])}
    rates = {name: moved[name] / middle[name] / 1e9 for name in moved}
    found |= {f"{name}_gb_s": rate for name, rate in rates.items()}
    return found | {f"{name}_share_of_copy": rates[name] / rates["copy"] for name in ("merge", "project")}


def cuda_memory(device: torch.device) -> dict[str, float]:
    """Give the peak of CUDA's allocator; the floor's model is in it."""
    if device.type != "cuda":
        return {}
    return {"peak_cuda_mib": torch.cuda.max_memory_allocated(device) / MIB}


def child_peak(args: argparse.Namespace) -> dict[str, float]:
    """Give this process's peak memory over some steps; call it in a fresh process."""
    warm_up_libraries()
    imported = memory("VmRSS")
    if args.child == PLAIN:
        args.experts = 1
        step = plain_step(build(args, 1), args.precision, accumulate=True)
    else:
        step = adaptation_step(build(args, args.child), args.precision)
    step()
    step()
    between = memory("VmRSS")
    reset_peak()
    step()
    return {"imported": imported, "between_steps": between, "peak": memory("VmHWM")}


def warm_up_libraries() -> None:
    """Let torch load its kernels, which is not the step's memory."""
    tower = VisionTransformer(28, 7, width=32, layers=1, heads=1, mlp_ratio=4.0, output_dim=8)
    tower(torch.zeros(2, 3, 28, 28)).sum().backward()


def memory(key: str) -> float:
    """Read a line of Linux's memory status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def reset_peak() -> None:
    """Let the high-water mark begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def run_child(args: argparse.Namespace, tasks_in_step: int) -> dict[str, float]:
    """Measure peak memory in a process of its own."""
    options = ["model", "experts", "images_per_task", "codec", "precision", "threads"]
    command = [sys.executable, __file__, "--child", str(tasks_in_step)]
    for name in options:
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, env=os.environ | MMAP_THRESHOLD, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the peak of steps that see 2, 4, ... tasks with the budget."""
    sizes = [n for n in (2, 4, 8, 16) if n <= args.experts]
    peaks = {n: run_child(args, n) for n in sizes}
    above = {n: peak["peak"] - peak["imported"] for n, peak in peaks.items()}
    plain = run_child(args, PLAIN)
    vectors, *_ = MODELS[args.model](args.experts, args.codec)
    base = sum(block.base_tensor().nbytes for block in vectors.blocks.values()) / MIB
    gradients = sum(block.base_tensor().numel() * 4 for block in vectors.blocks.values()) / MIB
    stored = vectors.n_bytes / MIB - base
    activations = plain["peak"] - plain["between_steps"]
    budget = base + stored + gradients + activations
    return {
        "peak_by_tasks_mib": above,
        "spread": max(above.values()) / min(above.values()) - 1,
        "base_mib": base,
        "vectors_mib": stored,
        "gradients_mib": gradients,
        "activations_mib": activations,
        "budget_mib": budget,
        "found_mib": max(above.values()),
        "within_budget": max(above.values()) <= budget,
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="zoo")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--images-per-task", type=int, default=16)
    parser.add_argument("--codec", choices=CODEC_DTYPES, default="fp32")
    parser.add_argument("--precision", choices=("32", "bf16-mixed"), default="32")
    parser.add_argument("--steps", type=int, default=None, help="timed steps; default 40 (zoo), 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, not time")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = args.steps or (40 if args.model == "zoo" else 5)
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.child is not None:
        print(json.dumps(child_peak(args)))
        return
    shared = ("model", "experts", "images_per_task", "codec", "precision", "threads", "device")
    found = {name: getattr(args, name) for name in shared} | MMAP_THRESHOLD
    if args.memory:
        found |= measure_memory(args)
    else:
        peak = run_child(args, args.experts)
        found |= {"runs": args.steps} | measure_time(args)
        found |= {"peak_rss_mib": peak["peak"], "peak_rss_above_imports_mib": peak["peak"] - peak["imported"]}
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
