"""Predictions that stay as they are when the image moves a little."""

import hashlib
from typing import Annotated

import torch
from jaxtyping import UInt8
from torch import Tensor

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Objective
from adamerge.objectives.matching import divergence
from adamerge.ranges import Range, Temperature, checked

Pixels = UInt8[Tensor, "image channel height width"]
Shift = Annotated[float, Range("[0, 0.5]")]


class Consistency(Objective):
    """KL(clean || augmented): the prediction of an augmented view follows that of the image itself.

    The clean view's prediction counts as fixed, as in UDA (arXiv:1904.12848); its use on coefficients is
    ours. A constant prediction satisfies it completely, so it belongs beside another objective, in
    `Mixed`. It costs a second forward and backward of every image, so a pass holds
    twice as many.

    Args:
        shift: Largest shift in each direction, as a fraction of the side; the border is repeated.
        flip: Mirror half of the images. Only where a mirrored image keeps its class: no digits, no letters.
        temperature: Divides both logits.

    Raises:
        InputError: ``shift`` is not in [0, 0.5], or ``temperature`` is not positive.
    """

    reads = "augmented"

    @checked
    def __init__(
        self,
        shift: Shift = 0.1,
        flip: bool = False,
        temperature: Temperature = 1.0,
    ) -> None:
        super().__init__()
        self.shift, self.flip, self.temperature = shift, flip, temperature

    def second_view(self, images: Tensor, task: str, step: int) -> Pixels:
        """Shift each image by its own number of pixels, and mirror some; the same for the same step.

        Raises:
            InputError: The inputs are not uint8 images.
        """
        if images.dim() != 4 or images.dtype != torch.uint8:
            raise InputError(f"Consistency augments uint8 images; task {task!r} has {images.dtype} inputs.")
        seed = hashlib.sha256(f"{task}/{step}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        rows, columns = (self._places(len(images), size, generator) for size in images.shape[2:])
        if self.flip:
            mirrored = torch.randint(2, (len(images), 1), generator=generator).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        rows, columns = rows.to(images.device), columns.to(images.device)
        each = torch.arange(len(images), device=images.device)[:, None, None]
        return images.movedim(1, -1)[each, rows[:, :, None], columns[:, None]].movedim(-1, 1)

    def _places(self, n_images: int, size: int, generator: torch.Generator) -> Tensor:
        """Give, for each image, where its rows (or columns) come from."""
        most = round(self.shift * size)
        moved = torch.randint(-most, most + 1, (n_images, 1), generator=generator)
        return (torch.arange(size) + moved).clamp(0, size - 1)

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean KL divergence in nats.

        Args:
            logits: Of the augmented view.
            task: Whose images these are.
            teacher: Of the clean view.

        Raises:
            InputError: The clean view's logits were not given.
        """
        if teacher is None:
            raise InputError(f"Consistency needs both views of task {task!r}, found one.")
        return divergence(logits, teacher.detach(), self.temperature)
