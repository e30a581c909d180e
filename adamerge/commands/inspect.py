"""`adamerge inspect`: base and experts before they are merged."""

import sys
from pathlib import Path

from adamerge import inspection
from adamerge.atomic import refuse_existing
from adamerge.checkpoints import locate
from adamerge.checkpoints.open_clip_source import PREFIX as OPEN_CLIP
from adamerge.commands.sources import parse_experts
from adamerge.data.tasks import EMBEDDED
from adamerge.errors import InputError
from adamerge.inspection.output import write
from adamerge.inspection.tables import show
from adamerge.plots import require_matplotlib
from adamerge.progress import console


def inspect(
    base: str,
    experts: list[str],
    *,
    json: bool = False,
    out: str | None = None,
    allow_missing: list[str] | None = None,
    exclude: list[str] | None = None,
    rank: bool = True,
    force: bool = False,
    overwrite: bool = False,
) -> int:
    """Look at a base and its experts: all that a merge would refuse, and what the task vectors are like.

    Exits with 2 where a merge would refuse, else with 0. The JSON document has the attributes of
    `adamerge.inspection.Report` as keys: tasks, problems, notes, base, experts, misfits, nonfinite, partial,
    kept, tied, same_base, zero, repeated, vectors.

    Args:
        base: The base: a folder in Hugging Face or open_clip layout, a safetensors file, or a hub id.
        experts: NAME=PATH of each expert, in the base's layout or as a PEFT LoRA folder.
        json: Print one JSON document instead of tables.
        out: A folder to write: inspect.json, inspect.md and pictures (which need matplotlib).
        allow_missing: Patterns of tensor names that experts may lack; the base's values stand.
        exclude: Patterns of tensor names that stay the base's, whatever the experts hold.
        rank: Measure the effective ranks of all matrices, which takes far longer than everything else.
        force: Report as notes what `merge --force true` accepts: experts that look as if they came from
            another base, and settings that differ.
        overwrite: Replace the folder if it exists.
    """
    sources = {task: _located(path, task) for task, path in parse_experts(experts).items()}
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
        require_matplotlib()
    report = inspection.inspect(
        locate(base, "base"),
        sources,
        allow_missing=allow_missing or (),
        exclude=exclude or (),
        rank=rank,
        force=force,
    )
    if out is not None:
        write(report, Path(out), overwrite=overwrite)
        console.print(f"Report and pictures are in {out}.")
    if json:
        sys.stdout.write(report.document())
    else:
        show(report)
    return 2 if report.problems else 0


def _located(path: str, task: str) -> Path:
    """Find an expert; one whose path does not exist is told in the report, beside all else that is wrong."""
    try:
        return locate(path, f"expert {task!r}")
    except InputError:
        if path.startswith((EMBEDDED, OPEN_CLIP)):
            raise
        return Path(path)
