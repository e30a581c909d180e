"""Measures what an adaptation step costs, against a floor that no step can beat.

    python scripts/bench_step.py --model zoo --experts 8 --images-per-task 16 --json
    python scripts/bench_step.py --model vit-b-32 --codec bf16 --memory --json

The step is the one that users run: MergeTask's training step, its backward and the optimizer. The floor
is a plain forward and backward of one model of the same architecture: same images, heads and loss, no
merge. Both run in one process, in turn; medians are reported. Merge and one projection are timed alone too,
beside a copy of memory on the same device; `forward_backward_s` is the rest of the step, in which large
gradients are projected once more in every pass.

`--memory` instead measures peak memory, each setting in a process of its own, for steps that see the
images of 2, 4, ... tasks, against the budget: base + vectors + one gradient copy + the activations of one
task. The libraries' own memory is taken off; the batch itself and a little slack are allowed. glibc's
allocator keeps freed blocks below its moving mmap threshold, so the threshold is fixed and reported.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from adamerge import Elements, Entropy, Learned, MergeTask, TaskVectors, zoo
from adamerge.checkpoints import open_checkpoint
from adamerge.coefficients import Coefficients
from adamerge.data.module import Batch
from adamerge.models import Head, ModuleBackbone, OpenClipBackbone
from adamerge.vectors import DenseCodec
from adamerge.vectors.block import project
from adamerge.vectors.dense import CODEC_DTYPES

N_CLASSES = 10
MIB = 2**20
COPIED = 2**28  # bytes of the copy that merge and projection are compared with
SLACK_MIB = 16  # Python's objects, small heap blocks, the buffer that widens half-precision vectors
MMAP_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
PLAIN = 0  # as a number of tasks: the plain model, which shows what one task's activations need


Opened = tuple[TaskVectors, ModuleBackbone, int]  # with the images' size


def zoo_experts(count: int, codec: str) -> Opened:
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


def random_experts(tower: dict[str, Any], count: int, codec: str) -> Opened:
    """Make a random image tower with experts that differ from it by noise."""
    module = VisionTransformer(**tower)
    form = DenseCodec(CODEC_DTYPES[codec])
    state = module.state_dict()
    blocks = {n: form.encode(state[n], 1e-3 * torch.randn(count, *state[n].shape)) for n in sorted(state)}
    vectors = TaskVectors(tuple(f"task{i}" for i in range(count)), blocks, {}, form)
    backbone = ModuleBackbone(module.to("meta"), mean=(0.5,) * 3, std=(0.25,) * 3)
    return vectors, backbone, tower["image_size"]


SHAPE = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "output_dim")
TINY = dict(zip(SHAPE, (14, 7, 16, 2, 2, 4.0, 12), strict=True))
VIT_B_32 = dict(zip(SHAPE, (224, 32, 768, 12, 12, 4.0, 512), strict=True))
MODELS = {
    "zoo": zoo_experts,
    "vit-b-32": partial(random_experts, VIT_B_32),
    "tiny": partial(random_experts, TINY),
}


COEFFICIENTS: dict[str, Callable[[], Coefficients]] = {
    "tensor": Learned,
    "row": partial(Elements, "row"),
    "entry": Elements,
}


def build(args: argparse.Namespace, tasks_in_step: int) -> tuple[MergeTask, Batch]:
    """Make the task, and a batch of random uint8 images for the first tasks."""
    torch.manual_seed(0)
    vectors, backbone, size = MODELS[args.model](args.experts, args.codec)
    dim = backbone.module.output_dim
    heads = {t: Head(100 * nn.functional.normalize(torch.randn(N_CLASSES, dim))) for t in vectors.tasks}
    learned = COEFFICIENTS[args.coefficients]()
    task = MergeTask(vectors, backbone, heads, learned, images_per_pass=args.images_per_task).to(args.device)
    task.on_fit_start()
    shape = (args.images_per_task, 3, size, size)
    tasks = vectors.tasks[:tasks_in_step]
    return task, {t: {"images": torch.randint(256, shape, dtype=torch.uint8).to(args.device)} for t in tasks}


def adaptation_step(task: MergeTask, precision: str = "32") -> Callable[[Batch], None]:
    """Give a function that takes one step as Lightning does."""
    optimizer = task.configure_optimizers()

    def step(batch: Batch) -> None:
        task.on_train_batch_start(batch, 0)
        optimizer.zero_grad()
        with autocast(task.device, precision):
            loss = task.training_step(batch, 0)
        loss.backward()
        task.on_after_backward()
        optimizer.step()
        task.coefficients.after_step()

    return step


def plain_step(task: MergeTask, precision: str, *, accumulate: bool = False) -> Callable[[Batch], None]:
    """Give a function that runs one plain model forward and backward, task by task."""
    backbone = task.backbone
    model = copy.deepcopy(backbone.module).to_empty(device=task.device).requires_grad_()
    weights = task.evaluated()
    model.load_state_dict({name: weights[file] for name, file in backbone.files.items()})
    objective = Entropy()

    def step(batch: Batch) -> None:
        if not accumulate:
            model.zero_grad()
        with autocast(task.device, precision):
            for name, part in batch.items():
                images = (part["images"].float() / 255 - backbone.mean) / backbone.std
                objective(task.heads[name].logits(model(images)), name).backward()

    return step


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Do as Lightning does for this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def parts(task: MergeTask) -> dict[str, Callable[[], Any]]:
    """Give merge, one projection and a plain copy of memory, each alone."""
    matrix = task.vectors.uniform(0.3)
    blocks = [task.vectors.blocks[name] for name in task.read_names]
    gradients = [torch.randn(b.base_tensor().shape, device=task.device) for b in blocks]
    source = torch.zeros(COPIED // 4, device=task.device)
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
    wide = sum(4 * b.base_tensor().numel() for b in blocks)
    return {"merge": stored + wide, "project": stored - base + wide, "copy": 2 * COPIED}


class Taken(NamedTuple):
    """Seconds on the clock, and of this process's processors: other processes do not add to those."""

    wall: float
    cpu: float


def timed(function: Callable[[], Any], device: torch.device) -> Taken:
    """Time one call, the device's work included."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    """Time floor, step and parts in turn."""
    task, batch = build(args, args.experts)
    functions = {
        "floor": partial(plain_step(task, args.precision), batch),
        "step": partial(adaptation_step(task, args.precision), batch),
        **parts(task),
    }
    for function in functions.values():
        timed(function, task.device)
    taken: dict[str, list[Taken]] = {name: [] for name in functions}
    for _ in range(args.steps):
        for name, function in functions.items():
            taken[name].append(timed(function, task.device))
    return summary(taken, bytes_moved(task)) | cuda_memory(task.device)


def summary(taken: dict[str, list[Taken]], moved: dict[str, int]) -> dict[str, Any]:
    """Give medians, extremes, the step's ratio to the floor, and rates."""
    middle = {name: median(t.wall for t in times) for name, times in taken.items()}
    cpu = {name: median(t.cpu for t in times) for name, times in taken.items()}
    found: dict[str, Any] = {f"{name}_s": middle[name] for name in ("step", "floor", "merge", "project")}
    found["forward_backward_s"] = middle["step"] - middle["merge"] - middle["project"]
    found |= {"ratio": middle["step"] / middle["floor"], "cpu_ratio": cpu["step"] / cpu["floor"]}
    for name in ("step", "floor"):
        walls = [t.wall for t in taken[name]]
        found |= {f"{name}_min_s": min(walls), f"{name}_max_s": max(walls), f"{name}_cpu_s": cpu[name]}
    rates = {name: moved[name] / middle[name] / 1e9 for name in moved}
    found |= {f"{name}_gb_s": rate for name, rate in rates.items()}
    return found | {f"{name}_share_of_copy": rates[name] / rates["copy"] for name in ("merge", "project")}


def cuda_memory(device: torch.device) -> dict[str, float]:
    """Give the peak of CUDA's allocator; the floor's model is in it."""
    if device.type != "cuda":
        return {}
    return {"peak_cuda_mib": torch.cuda.max_memory_allocated(device) / MIB}


def child_peak(args: argparse.Namespace) -> dict[str, float]:
    """Give this process's peak memory over a step, in MiB; call it in a fresh process."""
    warm_up_libraries(args)
    imported = memory("VmRSS")
    if args.child == PLAIN:  # gradients stay between its steps, as sums over tasks do
        task, batch = build(with_options(args, experts=1), 1)
        step = plain_step(task, args.precision, accumulate=True)
    else:
        task, batch = build(args, args.child)
        step = adaptation_step(task, args.precision)
    step(batch)
    step(batch)
    between = memory("VmRSS")
    reset_peak()
    step(batch)
    return {"imported": imported, "between_steps": between, "peak": memory("VmHWM")}


def warm_up_libraries(args: argparse.Namespace) -> None:
    """Take a tiny step and a large product: what libraries allocate once is not the step's memory."""
    task, batch = build(with_options(args, model="tiny"), 1)
    adaptation_step(task, args.precision)(batch)
    with autocast(task.device, args.precision):
        torch.ones(1024, 1024) @ torch.ones(1024, 1024)


def with_options(args: argparse.Namespace, **changed: Any) -> argparse.Namespace:
    """Give other options of the same kind."""
    return argparse.Namespace(**vars(args) | changed)


def memory(key: str) -> float:
    """Read a line of Linux's memory status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def reset_peak() -> None:
    """Let the high-water mark begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def run_child(args: argparse.Namespace, tasks_in_step: int) -> dict[str, float]:
    """Measure peak memory in a process of its own."""
    options = ["model", "experts", "images_per_task", "coefficients", "codec", "precision", "threads"]
    command = [sys.executable, __file__, "--child", str(tasks_in_step)]
    for name in options:
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, env=os.environ | MMAP_THRESHOLD, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the peak of steps that see 2, 4, ... tasks with the budget, in MiB."""
    sizes = [n for n in (2, 4, 8, 16) if n <= args.experts]
    peaks = {n: run_child(args, n) for n in sizes}
    above = {n: peak["peak"] - peak["imported"] for n, peak in peaks.items()}
    plain = run_child(args, PLAIN)
    task, batch = build(args, sizes[-1])
    blocks = task.vectors.blocks.values()
    base = sum(block.base_tensor().nbytes for block in blocks) / MIB
    terms = {
        "base_mib": base,
        "vectors_mib": task.vectors.n_bytes / MIB - base,
        "gradients_mib": sum(block.base_tensor().numel() * 4 for block in blocks) / MIB,
        "activations_mib": plain["peak"] - plain["between_steps"],
    }
    images = sum(part["images"].nbytes for part in batch.values()) / MIB
    budget, found = sum(terms.values()), above[sizes[-1]]
    return {
        "peak_by_tasks_mib": above,
        "spread": max(above.values()) / min(above.values()) - 1,
        **terms,
        "budget_mib": budget,
        "found_mib": found,
        "images_mib": images,
        "slack_mib": SLACK_MIB,
        "within_budget": found <= budget + images + SLACK_MIB,
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="zoo")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--images-per-task", type=int, default=16)
    parser.add_argument("--coefficients", choices=COEFFICIENTS, default="tensor")
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
    shared = (
        "model",
        "experts",
        "images_per_task",
        "coefficients",
        "codec",
        "precision",
        "threads",
        "device",
    )
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
