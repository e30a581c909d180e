"""What a run's settings may be, looked at before anything is opened or written."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from jsonargparse import Namespace

from adamerge.documents import require_path
from adamerge.errors import InputError
from adamerge.names import require_title
from adamerge.ranges import Count, Factor, Natural, Range, require

Batches = Annotated[int, Range("[0, 1e9]")] | Annotated[float, Range("[0, 1]")]
Epochs = Annotated[int, Range("[-1, -1]")] | Count


class _Run(TypedDict):
    seed_everything: bool | Annotated[int, Range("[0, 4294967295]")]
    run_dir: str
    method: str
    overwrite: bool
    resume_anyway: bool
    save_every: int
    evaluate_baselines: bool
    evaluate_start: bool
    evaluate_experts: bool
    gate: Mapping[str, float]


class _Trainer(TypedDict):
    accelerator: str
    strategy: str
    devices: Count | str | list[Natural]
    num_nodes: Count
    fast_dev_run: bool | Annotated[int, Range("[0, 1e6]")]
    max_epochs: Epochs | None
    min_epochs: Natural | None
    max_steps: Annotated[int, Range("[-1, 1e9]")]
    min_steps: Natural | None
    limit_train_batches: Count | Annotated[float, Range("[1, 1]")] | None  # the stream has no end
    limit_val_batches: Batches | None
    limit_test_batches: Batches | None
    limit_predict_batches: Batches | None
    overfit_batches: Annotated[float, Range("[0, 0]")]  # Lightning would take the sampler away
    val_check_interval: Natural | Annotated[float, Range("[1, 1]")] | str | None  # of no end there is no half
    check_val_every_n_epoch: Count | None
    num_sanity_val_steps: Annotated[int, Range("[-1, 1e9]")] | None
    log_every_n_steps: Natural | None
    enable_checkpointing: bool | None
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    accumulate_grad_batches: Count
    gradient_clip_val: Factor | None
    deterministic: bool | Literal["warn"] | None
    inference_mode: bool
    use_distributed_sampler: bool
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: Annotated[int, Range("[0, 0]")]  # a stream goes on where it was


def require_settings(settings: Any, command: str) -> None:
    """Refuse settings that no run can have.

    Args:
        settings: The resolved configuration of a subcommand.
        command: fit, validate, test or predict.

    Raises:
        InputError: The key, its value and its range.
    """
    _require_each(settings, _Run, "")
    if not isinstance(settings["trainer"], Mapping | Namespace):
        raise InputError("trainer is no mapping of settings.", "Write trainer: {max_steps: 500}.")
    trainer: Any = settings["trainer"]
    _require_each(trainer, _Trainer, "trainer.")
    require_path("run_dir", settings["run_dir"])
    require_title("method", settings["method"])
    if command == "fit":
        _require_processes(trainer, settings["data"]["tasks"])


def _require_each(settings: Any, known: type, prefix: str) -> None:
    """Compare settings with a table of annotations; classes in the place of names are not for it."""
    for key, hint in get_type_hints(known, include_extras=True).items():
        value = settings.get(key)
        if key in settings and not isinstance(value, Namespace):
            require(f"{prefix}{key}", value, hint)


def _require_processes(trainer: Any, tasks: Mapping[str, Any] | None) -> None:
    """Refuse more processes than tasks before they are started, and wait for one another."""
    devices = trainer["devices"]
    count = _count(devices)
    if count is None or tasks is None:
        return
    adapted = sum(getattr(spec, "adapt", None) is not None for spec in tasks.values())
    if count * trainer["num_nodes"] > max(adapted, 1):
        raise InputError(
            f"trainer.devices={devices} and num_nodes={trainer['num_nodes']}: "
            f"{count * trainer['num_nodes']} processes for {adapted} tasks.",
            "Some would have nothing to do: use at most one process for each task with `adapt` images.",
        )


def _count(devices: int | str | Sequence[int]) -> int | None:
    """Return a number of devices; None where it depends on the machine."""
    if isinstance(devices, str):
        words = devices.split(",")
        is_number = len(words) == 1 and devices.strip().isdecimal()
        return int(devices) if is_number else len(words) if len(words) > 1 else None
    return devices if isinstance(devices, int) else len(devices)
