"""Image preprocessing as a Hugging Face folder describes it, with PIL: equal to open_clip's, bit by bit."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.models.base import ImageTransform, image_mode
from adamerge.models.libraries import transformers_image_processor

_FILES = ("preprocessor_config.json", "processor_config.json")


def read_processor(folder: Path, channels: int = 3) -> ImageTransform:
    """Read a folder's image processor.

    Args:
        folder: The folder.
        channels: Channels of the images that the model reads.

    Raises:
        InputError: There is none, or it is damaged (no default stands in, for it may be another one); or it
            cannot prepare images of so many channels.
    """
    mode = image_mode(channels, folder)
    import transformers

    if not any((folder / name).is_file() for name in _FILES):
        raise InputError(
            f"{folder} does not say how images are prepared: it has neither {' nor '.join(_FILES)}.",
            f"Copy {_FILES[0]} of the model that was fine-tuned into the folder.",
        )
    processor: Any = transformers_image_processor(folder)

    def preprocess(image: Any) -> Tensor:
        image = image.convert(mode)
        return processor(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]

    # arithmetic is (factor x pixel - mean) / std, written in units of the full range
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    versions = {"library": f"transformers {transformers.__version__}", "pillow": PIL.__version__}
    key = json.dumps(versions | {"backend": "pil"} | processor.to_dict(), sort_keys=True, default=str)
    found = ImageTransform(preprocess, [m / factor for m in mean], [s / factor for s in std], key)
    _require_equal(found, processor, folder, channels)
    return found


def _require_equal(transform: ImageTransform, processor: Any, folder: Path, channels: int) -> None:
    """Refuse a processor whose arithmetic is more than a rescaling and a normalisation.

    Raises:
        InputError: A probe image comes out otherwise.
    """
    pixels = torch.arange(40 * 50 * 3).reshape(40, 50, 3) * 7 % 256
    image = PIL.Image.fromarray(pixels.to(torch.uint8).numpy()).convert(image_mode(channels, folder))
    name = f"the image processor of {folder} ({type(processor).__name__})"
    try:
        prepared = transform.preprocess(image)
        expected = processor(image, return_tensors="pt").pixel_values[0]
    except Exception as error:  # whatever the library stumbles over, the processor does not fit
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name} cannot prepare images of {channels} channels, as the model reads them: "
            f"{type(error).__name__} {reason}",
            "Do image_mean and image_std have one value for each channel?",
        ) from error
    if prepared.dtype == torch.uint8 and prepared.dim() == 3 and len(prepared) == channels:
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (transform.mean, transform.std))
        prepared = (prepared / 255 - mean) / std
        if prepared.shape == expected.shape and torch.allclose(prepared, expected, atol=0.02):
            return
    raise InputError(
        f"{name} does more than resize, crop, rescale and normalise images of {channels} channels.",
        "Use a base whose processor does no more, or a backbone of your own (adamerge.ModuleBackbone).",
    )
