"""Measures memory and time of FW-Merging over experts that stay in their files.

    python scripts/bench_fw_memory.py --model vit-b-32 --experts 2 8 20 --steps 3 --json

A random image tower and noisy copies of it, as fine-tuned experts, are written once to --folder. Then every
number of experts, under every codec, takes --steps hard, layer-wise Frank-Wolfe steps on random images in a
process of its own, with --images-per-task images of each expert's task, one task in a pass. `peak_rss_mib` is
of the whole process from its start to the last step, libraries (`imports_rss_mib`) included;
`seconds_per_step` and `cpu_seconds_per_step`, to which other processes do not add, are medians. The files are
in the page cache, or not, as the system has it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_step as step
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import nn

from adamerge import FrankWolfe, MergeTask, TaskVectors
from adamerge.data.module import Batch
from adamerge.models import Head, ModuleBackbone
from adamerge.models.base import without_values
from adamerge.vectors import STREAM

TOWERS = {"vit-b-32": step.VIT_B_32, "tiny": step.TINY}
NOISE = 1e-3  # standard deviation of what an expert adds to the base


def main() -> None:
    """Write the experts, measure case by case, print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", choices=TOWERS, default="vit-b-32")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8, 20])
    parser.add_argument("--codecs", nargs="+", choices=(STREAM, *step.CODEC_DTYPES), default=[STREAM, "fp32"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--images-per-task", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "adamerge-fw")
    parser.add_argument("--json", action="store_true", help="print one JSON line per case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measured(args)))
        return
    write(args)
    for codec in args.codecs:
        for count in args.experts:
            row = {"model": args.model, "experts": count, "codec": codec, **child(args, codec, count)}
            print(json.dumps(row) if args.json else text(row), flush=True)


def text(row: dict[str, Any]) -> str:
    """Give one readable line."""
    return (
        f"{row['model']} {row['codec']} {row['experts']:>3} experts: peak {row['peak_rss_mib']:.0f} MiB, "
        f"{row['seconds_per_step']:.2f} s a step"
    )


def write(args: argparse.Namespace) -> None:
    """Write the base and as many experts as the largest case has, unless they are there."""
    torch.manual_seed(0)
    folder = args.folder / args.model
    folder.mkdir(parents=True, exist_ok=True)
    state = VisionTransformer(**TOWERS[args.model]).state_dict()
    for name in ("base", *map(str, range(max(args.experts)))):
        noise = 0 if name == "base" else NOISE
        near = {key: tensor + noise * torch.randn_like(tensor) for key, tensor in state.items()}
        if not (folder / f"{name}.safetensors").exists():
            save_file(near, folder / f"{name}.safetensors")


def child(args: argparse.Namespace, codec: str, count: int) -> dict[str, float]:
    """Measure one case in a fresh process."""
    command = [sys.executable, __file__, "--child", "--codecs", codec, "--experts", str(count)]
    for name in ("model", "steps", "images_per_task", "threads", "folder"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ | step.MMAP_THRESHOLD
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Open the experts, take the steps, and give time and this process's peak memory."""
    imports = step.memory("VmHWM")
    task, batch = build(args)
    take = partial(step.adaptation_step(task), batch)
    taken = [step.timed(take, task.device) for _ in range(args.steps)]
    return {
        "peak_rss_mib": step.memory("VmHWM"),
        "imports_rss_mib": imports,
        "seconds_per_step": median(t.wall for t in taken),
        "cpu_seconds_per_step": median(t.cpu for t in taken),
    }


def build(args: argparse.Namespace) -> tuple[MergeTask, Batch]:
    """Open the experts as users do, beside random heads and images."""
    torch.manual_seed(0)
    folder, tower, tasks = args.folder / args.model, TOWERS[args.model], range(args.experts[0])
    experts = {f"task{i}": folder / f"{i}.safetensors" for i in tasks}
    module = without_values(lambda: VisionTransformer(**tower))
    backbone = ModuleBackbone(module, mean=(0.5,) * 3, std=(0.25,) * 3)
    vectors = TaskVectors.open(folder / "base.safetensors", experts, args.codecs[0])
    dim, size = tower["output_dim"], tower["image_size"]
    heads = {t: Head(100 * nn.functional.normalize(torch.randn(step.N_CLASSES, dim))) for t in experts}
    task = MergeTask(vectors, backbone, heads, optimizer=FrankWolfe, images_per_pass=args.images_per_task)
    task.on_fit_start()
    shape = (args.images_per_task, 3, size, size)
    return task, {t: {"images": torch.randint(256, shape, dtype=torch.uint8)} for t in experts}


if __name__ == "__main__":
    main()
