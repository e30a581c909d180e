# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Ablations
#
# What matters for learned coefficients: where they start, how many steps, how much unlabelled data, how
# finely they are grouped, what is minimised? Each row below changes one thing of a common setting. Three
# embedded tasks keep it quick; take other tasks or more steps freely.

# %%
import csv
import logging
import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

import adamerge
from adamerge import results, zoo
from adamerge.callbacks import Selector

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
FAST = bool(os.environ.get("ADAMERGE_FAST"))
TASKS = ("mnist", "styles", "textures")[2 * FAST :]
STEPS = 2 if FAST else 30
SPECS = {t: adamerge.TaskSpec(adapt=f"embedded:{t}/adapt", test=f"embedded:{t}/test") for t in TASKS}

vectors = adamerge.TaskVectors.open(zoo.base(), {t: zoo.experts()[t] for t in TASKS})
backbone = adamerge.OpenClipBackbone(zoo.base())
heads = adamerge.zero_shot_heads(zoo.base(), SPECS)
everyone = adamerge.MultiTaskData(SPECS)  # a fifth of the unlabelled images is held out
individual: dict[str, float] = {}
rows: dict[str, list[results.ResultRow]] = {}


def run(
    study: str,
    name: str,
    *,
    objective: Any = None,
    steps: int = STEPS,
    data: Any = None,
    coefficients: Any = None,
    callbacks: Any = (),
    **learned: Any,
) -> None:
    """Adapt once and keep the row; what is not given is the common setting."""
    objective, data = objective or adamerge.KLTeacher(), data or everyone
    task = adamerge.MergeTask(
        vectors,
        backbone,
        heads,
        coefficients or adamerge.Learned(**learned),
        objective,
        optimizer=lambda p: torch.optim.Adam(p, lr=3e-2),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0, "max_epochs": -1}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit(task, datamodule=data)
    if not individual:
        individual.update(task.evaluate_experts())
    rows.setdefault(study, []).append(results.make_row(name, task.evaluate(), individual))


def show(study: str) -> None:
    """Print a study's table."""
    print(results.markdown_table(rows[study]))


# %% [markdown]
# ## Where they start
#
# 0.3 is task arithmetic's usual value, 1 / number of tasks is averaging.

# %%
for initial in (0.0, 0.3, 0.6, 1.0):
    run("initial value", f"initial {initial}", initial=initial)
show("initial value")

# %% [markdown]
# ## How many steps

# %%
for steps in (0, STEPS // 2, STEPS, 2 * STEPS):
    run("steps", f"{steps} steps", steps=steps)
show("steps")

# %% [markdown]
# ## How much data
#
# `holdout` keeps a part of the unlabelled images from adaptation: of 500 images per task, 5 to 500 remain.

# %%
for fraction in (0.01, 0.1, 1.0):
    batch = {"holdout": 1 - fraction, "batch_size": 4 if fraction < 0.05 else 16}
    run("data", f"{fraction:.0%} of the images", data=adamerge.MultiTaskData(SPECS, **batch))
show("data")

# %% [markdown]
# ## How finely
#
# One coefficient per task, per transformer block, per module, or per tensor; or finer: per singular component
# of each matrix, per row of it (each output), or per entry.

# %%
for grouping in ("task", "block", "module", "tensor"):
    run("grouping", grouping, grouping=grouping)
spaces = {
    "component": adamerge.Components("weight"),
    "row": adamerge.Elements("row"),
    "entry": adamerge.Elements("entry"),
}
for name, space in spaces.items():
    run("grouping", name, coefficients=space)
show("grouping")

# %% [markdown]
# ## What is minimised

# %%
objectives = {
    "entropy": adamerge.Entropy(),
    "entropy / log C": adamerge.Entropy(normalize="log_c"),
    "reliable entropy": adamerge.ReliableEntropy(),
    "teacher KL": adamerge.KLTeacher(),
}
for name, objective in objectives.items():
    run("objective", name, objective=objective)
show("objective")

# %% [markdown]
# ## Without and with the selector
#
# The selector looks at held-out unlabelled images and keeps the state whose predictions are nearest to the
# experts'; the start is a candidate, so a proxy that is over-fitted costs nothing.

# %%
for name, callbacks in {"last state": (), "selector": (Selector(every_n_steps=5),)}.items():
    run("selector", name, objective=adamerge.Entropy(), steps=2 * STEPS, callbacks=callbacks)
show("selector")

# %%
figure, axes = plt.subplots(1, len(rows), figsize=(13, 2.8), sharey=True)
for axis, (study, found) in zip(axes, rows.items(), strict=True):
    axis.bar(range(len(found)), [row.normalized_mean or 0 for row in found], color="#9ecae1")
    axis.set_xticks(range(len(found)), [row.method for row in found], rotation=60, ha="right", fontsize=7)
    axis.set_title(study, fontsize=9)
axes[0].set_ylabel("normalised accuracy, %")
axes[0].set_ylim(60, 100)
assert all(0 < (row.mean or 0) <= 100 for found in rows.values() for row in found)

# %% [markdown]
# ## The study
#
# The same questions on all tasks, over seeds and under stress. `docs/study` holds what these commands wrote;
# `ZOO` is a zoo of real image tasks as `scripts/train_zoo.py` makes it:
#
#     python scripts/study.py stress --benchmark embedded --methods M1,M2 --out runs/study/embedded
#     python scripts/study.py grid --benchmark embedded --seeds 0 --out runs/study/embedded
#     python scripts/study.py fractions --benchmark embedded --methods M1,M2 --out runs/study/embedded
#     python scripts/study.py steps --benchmark embedded --methods M1,M2 --out runs/study/embedded
#     python scripts/study.py stress --benchmark ZOO/benchmark.yaml --methods M1,M2 --out runs/study/suite
#
# First, what each method gains over its own start where the adaptation images come as they please; bars are
# the spread over seeds.

# %%
STUDY = Path(adamerge.__file__).parents[1] / "docs" / "study"  # of the clone that this notebook lies in


def read(name: str) -> dict[str, dict[str, float]]:
    """Read one of the study's tables: the numbers of every method that learns, by column."""
    with (STUDY / f"{name}.csv").open(encoding="utf-8") as stream:
        found = {row.pop("method"): row for row in csv.DictReader(stream)}
    numbers = {name: {key: float(text) for key, text in row.items() if text} for name, row in found.items()}
    return {name: row for name, row in numbers.items() if "worst minus start" in row}


def cases_of(row: dict[str, float]) -> list[str]:
    """Give the cases of a table."""
    return [name for name in row if f"{name} minus start" in row]


def draw(axis: Any, name: str, suffix: str = "") -> None:
    """Draw a row per method over the cases, with its spread."""
    for method, row in read(name).items():
        cases = cases_of(row)
        spread = [row.get(f"{case}{suffix} sd", 0.0) for case in cases]
        axis.errorbar(
            cases, [row[case + suffix] for case in cases], spread, fmt="o-", capsize=2, label=method
        )
    axis.tick_params("x", rotation=60)
    axis.set_title(name, fontsize=9)


figure, axes = plt.subplots(1, 2, figsize=(13, 3.5))
for axis, benchmark in zip(axes, ("embedded", "suite"), strict=True):
    draw(axis, f"{benchmark}/stress", " minus start")
    axis.axhline(0, color="grey", linewidth=0.8)
axes[0].set_ylabel("points above the start")
axes[0].legend(fontsize=7)

# %% [markdown]
# How many images a task, and how many steps (as a share of the method's own number)?

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
draw(axes[0], "embedded/fractions")
draw(axes[1], "embedded/steps")
axes[0].set_ylabel("mean accuracy, %")
axes[0].legend(fontsize=7)

# %% [markdown]
# Initialiser x objective, in every coefficient space, 100 steps each.

# %%
grid = read("embedded/grid")
spaces = cases_of(next(iter(grid.values())))
starts, objectives = (list(dict.fromkeys(name.split("-")[part] for name in grid)) for part in (0, 1))
figure, axes = plt.subplots(1, len(spaces), figsize=(13, 3.2), sharey=True)
for axis, space in zip(axes, spaces, strict=True):
    values = [[grid[f"{start}-{name}"][space] for name in objectives] for start in starts]
    axis.imshow(values, vmin=75, vmax=88, aspect="auto", cmap="Blues")
    axis.set_xticks(range(len(objectives)), objectives, rotation=60)
    axis.set_yticks(range(len(starts)), [start.removeprefix("start_") for start in starts])
    axis.set_title(space)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7)

# %% [markdown]
# ## What came out
#
# The study: KL to the experts is the best objective from every start and in every space; entropy gains least
# and, left alone, loses on the suite. A start at TSV or Iso-C, and coefficients per entry, add up to a point
# on the embedded tasks and nothing on the suite. More steps and more images help up to the end of what was
# tried.
#
# The cells above: one run for each row, three tasks, learning rate 0.03: differences below a point mean
# nothing. Task arithmetic, where all but the first study begin, has a mean of 73.4 %, the experts 85.1.
#
# - The initial value matters little: from 0 to 1, 30 steps end between 80.3 and 82.6 %.
# - Steps matter: 80.1 % after 15, 81.7 after 30, 82.5 after 60.
# - Data matter little: 50 images a task give 81.5 %, all 500 give 81.2; with only 5 it is 80.1.
# - One coefficient per task gives 80.4 %, per module or tensor 81.7; per component 83.1, per row 83.2; per
#   entry 81.7 (at a rate that does not fall; with one that does, and 100 steps, it is the best: see above).
# - The objective matters most: entropy 76.7, reliable entropy 78.2, teacher KL 81.7 %. Entropy gains on
#   `styles` and `textures` and loses on `mnist` (80.2 at the start, 72.8 at the end).
# - The selector stops entropy at its best look: 77.4 %, where the last state has 77.6. It saves what can be
#   lost, and does not make an objective better.
