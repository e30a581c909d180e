"""Image preprocessing as a Hugging Face folder describes it, with PIL: equal to open_clip's, bit by bit."""

import json
from pathlib import Path
from typing import Any

import PIL
from torch import Tensor

from adamerge.errors import InputError
from adamerge.models.base import ImageTransform

_FILES = ("preprocessor_config.json", "processor_config.json")


def read_processor(folder: Path) -> ImageTransform:
    """Read a folder's image processor.

    Raises:
        InputError: There is none, or it is damaged; no default stands in, for it may be another one.
    """
    import transformers

    if not any((folder / name).is_file() for name in _FILES):
        raise InputError(
            f"{folder} does not say how images are prepared: it has neither {' nor '.join(_FILES)}.",
            f"Copy {_FILES[0]} of the model that was fine-tuned into the folder.",
        )
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True
        )
    except Exception as error:  # whatever transformers stumbles over, the files are what is wrong
        reason = str(error).splitlines()[0]
        raise InputError(f"the image processor of {folder} cannot be read: {reason}") from error

    def preprocess(image: Any) -> Tensor:
        return processor(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]

    # arithmetic is (factor x pixel - mean) / std, written in units of the full range
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    versions = {"library": f"transformers {transformers.__version__}", "pillow": PIL.__version__}
    key = json.dumps(versions | {"backend": "pil"} | processor.to_dict(), sort_keys=True, default=str)
    return ImageTransform(preprocess, [m / factor for m in mean], [s / factor for s in std], key)
