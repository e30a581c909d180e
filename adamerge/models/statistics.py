"""Statistics of the experts on unlabelled images: Gram matrices of layers' inputs, and Fisher diagonals."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from adamerge.errors import InputError, shortlist
from adamerge.models.base import Backbone
from adamerge.models.blockwise import Blocks
from adamerge.models.experts import Experts, Inputs
from adamerge.models.fisher import MODES, FisherMode
from adamerge.models.heads import Head
from adamerge.models.measured import ExpertStatistic, Fisher, Gram, PrefixGram
from adamerge.state import State


class Statistics(Mapping[str, ExpertStatistic]):
    """What static methods may ask of the experts: "fisher", "gram", "prefix_gram" and "blocks".

    Each is called with a parameter's name and the tensors merged so far, and gives one tensor for all
    tasks on the CPU, or None where the parameter has no such statistic; ``order`` lists the parameters
    in the order of the forward pass.

    - "gram": X'X / n ``[task, in, in]`` of the inputs X of a linear weight (RegMean, arXiv:2212.09849),
      one row per image and token, in each task's expert, on that task's images.
    - "prefix_gram": the same where the expert's block reads what the merged blocks before it give
      (RegMean++, arXiv:2508.03121). What is merged is looked up in the mapping that comes with the call;
      ask in the given order. It is not kept.
    - "blocks": no tensors, but the model's blocks, and what they are given (ProDistill, arXiv:2502.12706);
      see `adamerge.models.blockwise.Blocks`. It is not kept.
    - "fisher": diagonals ``[task, *param]`` of the Fisher matrices (arXiv:2111.09832).

    Nothing is computed before it is asked for. Then as many parameters as fit into the memory budget are
    measured in one walk over a task's images. Results are kept in files; what is there is read lazily,
    without reading images or weights.

    Args:
        backbone: The model; it is moved to the device.
        heads: Every task's head, whose predictions Fisher diagonals are about. "gram" needs none.
        images: Every task's inputs of ``backbone.features``, stacked (uint8
            ``[image, channel, height, width]``), or a function that gives them when they are needed. No
            labels are read. Its keys are the tasks, in the order of the vectors' tasks.
        expert_weights: Gives, by task, all tensors that the backbone reads, of any floating dtype.
        samples: Images per task, drawn without replacement; all where there are fewer.
        batch_size: Images per forward pass.
        seed: Of the choice of images and of sampled labels.
        fisher_mode: "exact" (a gradient per image and class), "sampled_label" (a gradient per image, of
            a class drawn from the prediction), or "batch_sqrt" (as MergeLM); see `fisher_diagonal`.
        memory_budget: Bytes of statistics that are collected at once.
        device: Where to compute.
        cache: Folder of the files; default: a temporary one that goes with this object.
        keys: By task, a digest of all that its statistics depend on beyond these options: the expert's
            weights, its images and its head. Needed with a cache.

    Raises:
        InputError: An option is wrong, or a cache comes without keys.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Mapping[str, Head],
        images: Mapping[str, Inputs],
        expert_weights: Callable[[str], State],
        *,
        samples: int = 256,
        batch_size: int = 32,
        seed: int = 0,
        fisher_mode: FisherMode = "sampled_label",
        memory_budget: int = 2**30,
        device: torch.device | str = "cpu",
        cache: str | Path | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        _require_options(samples, batch_size, memory_budget, fisher_mode)
        missing = [task for task in images if cache is not None and task not in (keys or {})]
        if missing:
            raise InputError(
                f"a cache was given, but no key of {shortlist(missing)}.",
                "Pass keys={TASK: DIGEST} of the expert's weights, its images and its head.",
            )
        folder = Path(tempfile.mkdtemp(prefix="adamerge-")) if cache is None else Path(cache)
        experts = Experts(
            backbone=backbone.to(torch.device(device)),
            heads=heads,
            images=images,
            expert_weights=expert_weights,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            budget=memory_budget,
            device=torch.device(device),
            folder=folder,
            keys=keys or {},
        )
        if cache is None:
            weakref.finalize(experts, shutil.rmtree, folder, ignore_errors=True)
        self._tasks = tuple(images)
        self._kinds: dict[str, ExpertStatistic] = {
            "fisher": Fisher(experts, fisher_mode),
            "gram": Gram(experts),
            "prefix_gram": PrefixGram(experts),
            "blocks": Blocks(experts),
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of every statistic's first axis."""
        return self._tasks

    def __getitem__(self, kind: str) -> ExpertStatistic:
        return self._kinds[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def _require_options(samples: int, batch_size: int, memory_budget: int, fisher_mode: str) -> None:
    for name, value in {"samples": samples, "batch_size": batch_size, "memory_budget": memory_budget}.items():
        if value < 1:
            raise InputError(f"{name}={value} is not positive.")
    if fisher_mode not in MODES:
        raise InputError(f"fisher_mode={fisher_mode!r} is unknown.", f"Use one of {', '.join(MODES)}.")
