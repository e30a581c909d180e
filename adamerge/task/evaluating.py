"""Evaluation of a merged model: Lightning's validate, test and predict, and the same without a loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from adamerge.evaluation import Evaluation, evaluate, mixture_features
from adamerge.mixture import Mixture
from adamerge.models import accuracy
from adamerge.objectives import entropy_of
from adamerge.progress import track
from adamerge.task.parts import MergedParts


class Evaluating(MergedParts):
    """A merged model with its evaluation. For the arguments see `MergeTask`."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.accuracy: dict[str, float] = {}
        self._entropies: dict[str, list[Tensor]] = {}
        self._accuracy: dict[str, MulticlassAccuracy] = {}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure entropy on held-out adaptation images, which have no labels."""
        task = self.data.adapting_tasks[dataloader_idx]
        logits = self._classifier(task, self._weights)(batch["images"])
        self._entropies.setdefault(task, []).append(entropy_of(logits))

    def on_validation_epoch_end(self) -> None:
        """Log each task's mean entropy in nats, and the mean over tasks."""
        means = {task: torch.cat(parts).mean() for task, parts in self._entropies.items()}
        self.log_dict({f"val/entropy/{task}": mean for task, mean in means.items()})
        self.log("val/entropy_mean", torch.stack(list(means.values())).mean())
        self._entropies = {}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure top-1 accuracy (micro average) on labelled test images, with the task known."""
        task = self.data.tested_tasks[dataloader_idx]
        self._accuracy[task].update(self._classifier(task, self._weights)(batch["images"]), batch["labels"])

    def on_test_epoch_end(self) -> None:
        """Log each task's accuracy in percent, and the plain mean over tasks."""
        self.accuracy = {task: 100 * float(m.compute()) for task, m in self._accuracy.items()}
        self.log_dict({f"eval/acc/{task}": value for task, value in self.accuracy.items()})
        self.log("eval/acc_mean", sum(self.accuracy.values()) / len(self.accuracy))

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Give class and probability of each image, with the task known."""
        task = tuple(self.data.tasks)[dataloader_idx]
        p = self._classifier(task, self._weights)(batch["images"]).softmax(-1)
        probability, label = p.max(-1)
        return {"task": task, "index": batch["index"], "class": label, "probability": probability}

    def evaluate(self) -> dict[str, float]:
        """Give top-1 accuracy in percent on each task's test images, without a trainer loop."""
        return self.evaluation().known

    @torch.no_grad()
    def evaluation(self, mixture: Mixture | None = None) -> Evaluation:
        """Evaluate on all test images with the task known and unknown, without a trainer loop.

        Args:
            mixture: Another model on the same backbone and heads; default: this task's own.
        """
        self._merge_for_evaluation()
        model = mixture or self.mixture
        features = mixture_features(model) if model else self._static_features
        told = model is not None and model.routing is not None and model.routing.reads == "task"
        tasks = self._tested_with_expert if told else None
        return evaluate(features, self.fitted_heads, self.data, self._walk_test, told=told, tasks=tasks)

    def _static_features(self, batch: Tensor, _task: str) -> tuple[Tensor, None]:
        return self.backbone.features(self._weights, batch), None

    def _walk_test(self, function: Callable[[Tensor], Tensor], task: str) -> Tensor:
        return self._walk(function, self.data.test(task))

    def evaluate_start(self) -> dict[str, float]:
        """Give top-1 accuracy in percent under what was learned at its start; nothing else changes."""
        learned = {name: value.clone() for name, value in self.learned.state_dict().items()}
        self.reset_learned()
        try:
            with torch.random.fork_rng(devices=[]):  # loaders draw a number, even where they walk in order
                return self.evaluate()
        finally:
            self.learned.load_state_dict(learned)
            self._weights = {}  # they are the start's

    @torch.no_grad()
    def evaluate_experts(self) -> dict[str, float]:
        """Give each expert's accuracy in percent on its own task's test images."""
        self._place()
        found = {}
        for task in track(self._tested_with_expert, "Evaluating the experts"):
            images = self.data.test(task)
            assert images.labels is not None  # `test` loads them or raises
            found[task] = accuracy(self.expert_logits(task, images), images.labels)
        return found

    @property
    def _tested_with_expert(self) -> tuple[str, ...]:
        """Tasks with test images, without those that are evaluated only."""
        return tuple(task for task in self.data.tested_tasks if task in self.vectors.tasks)

    def on_validation_start(self) -> None:
        """Merge once for the whole pass."""
        self._merge_for_evaluation()

    def on_test_start(self) -> None:
        """Merge once for the whole pass, and count from zero."""
        self._merge_for_evaluation()
        for task in self.data.tested_tasks:
            n_classes = len(self.heads[task].weight)
            self._accuracy[task] = MulticlassAccuracy(n_classes, average="micro").to(self._where)

    def on_predict_start(self) -> None:
        """Merge once for the whole pass."""
        self._merge_for_evaluation()
