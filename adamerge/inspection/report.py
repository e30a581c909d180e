"""The report on a base and its experts: all that a merge would refuse, and what the vectors look like."""

import json
from dataclasses import asdict, dataclass

from adamerge.inspection.checks import Misfit, NonFinite
from adamerge.inspection.geometry import Geometry


@dataclass(frozen=True)
class ModelFacts:
    """A checkpoint as it lies there.

    Attributes:
        source: Its path; "memory" for a state that was given as such.
        tensors: Number of tensors.
        parameters: Number of values.
        dtypes: Number of tensors by dtype.
        lora_ranks: Of an adapter: number of tensors by the rank of their change.
    """

    source: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    lora_ranks: dict[str, int]


@dataclass(frozen=True)
class Kept:
    """A tensor that stays the base's.

    Attributes:
        tensor: Its name.
        found: Its dtype and shape.
        reason: "integer", "excluded", or "no expert" has one that fits.
    """

    tensor: str
    found: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was found; `document` gives it as plain dictionaries and lists.

    Attributes:
        tasks: Names of the experts that could be read, in the order given.
        problems: What a merge would refuse; empty where it would not.
        notes: What a merge would warn of or do silently, and a person should know.
        base: The base.
        experts: Each expert.
        misfits: Tensors that the base and an expert do not share.
        nonfinite: Tensors with NaN or infinite values.
        partial: Tensors that only some experts have, and those that do.
        kept: Tensors that stay the base's.
        tied: From each alias to the tensor that stands for it.
        same_base: By task, whether the expert is nearer to the base than the base is long.
        zero: Experts that equal the base.
        repeated: Pairs of experts that are equal.
        vectors: The vectors of all tensors that could be compared; None where there are none.
    """

    tasks: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    base: ModelFacts
    experts: dict[str, ModelFacts]
    misfits: tuple[Misfit, ...]
    nonfinite: tuple[NonFinite, ...]
    partial: dict[str, tuple[str, ...]]
    kept: tuple[Kept, ...]
    tied: dict[str, str]
    same_base: dict[str, bool]
    zero: tuple[str, ...]
    repeated: tuple[tuple[str, str], ...]
    vectors: Geometry | None

    def document(self) -> str:
        """Give the report as one JSON document, with the attributes' names as keys."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
