"""Image preprocessing as a Hugging Face folder describes it, with PIL: equal to open_clip's, bit by bit."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from adamerge.checkpoints.configs import DifferenceError, read_settings
from adamerge.errors import InputError
from adamerge.models.base import ImageTransform, image_mode
from adamerge.models.libraries import transformers_image_processor

_FILES = ("preprocessor_config.json", "processor_config.json")
# What a processor's settings hold beside what it does to an image.
_HOUSEKEEPING = re.compile(
    r"_.*|image_processor_type|feature_extractor_type|processor_class|device|return_tensors|\w*data_format"
    r"|disable_grouping|auto_map"
)
_LARGEST = 4096  # pixels along a side of an image that is made for a comparison
_PLAIN = re.compile(r"image_mean|image_std|size|crop_size|resample|rescale_factor|do_\w+")


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
    factor = 255.0 * (processor.rescale_factor if processor.do_rescale else 1.0)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (
        np.atleast_1d(values).astype(float).tolist() for values in (mean, std)
    )  # one number stands for all
    _require_divisors(folder, rescale_factor=[factor], image_std=std)
    versions = {"library": f"transformers {transformers.__version__}", "pillow": PIL.__version__}
    key = json.dumps(versions | {"backend": "pil"} | processor.to_dict(), sort_keys=True, default=str)
    found = ImageTransform(preprocess, [m / factor for m in mean], [s / factor for s in std], key)
    _require_equal(found, processor, folder, channels)
    return found


def _require_divisors(folder: Path, **settings: Sequence[float]) -> None:
    for name, values in settings.items():
        if not np.all(np.isfinite(values)) or 0 in values:
            raise InputError(
                f"the image processor of {folder} has {name} {list(values)}, which divides nothing.",
                f"Correct it in {_FILES[0]}.",
            )


def require_same_processors(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare what transformers' own image processors do, as it reads them from base and experts.

    Versions write the same processor in many ways: absent keys mean defaults, a size may be a number, and
    classes have several names. So processors are read by the library, and where their settings differ, an
    image tells whether what they do differs. Folders without a processor are not judged.

    Raises:
        DifferenceError: An image comes out otherwise; the settings that differ are named with both values.
        InputError: A file is damaged.
    """
    lines = [line for task, expert in experts.items() for line in _differences(task, base, expert)]
    if lines:
        raise DifferenceError(lines)


def _differences(task: str, base: Path, expert: Path) -> Iterator[str]:
    ours, theirs = _stored(base), _stored(expert)
    if not ours or not theirs or ours == theirs:
        return
    pair = _opened(base, ours, expert, theirs)
    if pair is None:  # no processor of images that transformers knows: what is written can be compared
        values = [{k: v for k, v in part.items() if _PLAIN.fullmatch(k)} for part in (ours, theirs)]
        keys = values[0].keys() & values[1].keys()
    elif _acts_alike(*pair):
        return
    else:
        values = [_effective(processor) for processor in pair]
        keys = values[0].keys() | values[1].keys()
    for key in sorted(keys):
        a, b = (part.get(key) for part in values)
        if a != b:
            yield f"{key} differs: base {a!r}, expert {task!r} {b!r}."
    if pair is not None and values[0] == values[1]:
        yield f"image processor differs: base {type(pair[0]).__name__}, expert {type(pair[1]).__name__}."


def _stored(folder: Path) -> dict[str, Any]:
    """Read the settings of a folder's image processor as they are written."""
    settings = read_settings(folder / _FILES[0])
    return settings or read_settings(folder / _FILES[1]).get("image_processor") or {}


def _opened(base: Path, ours: dict[str, Any], expert: Path, theirs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Let transformers read both processors; what does not say its class is read by the other's."""
    found: list[Any] = []
    for folder in (base, expert):
        try:
            found.append(transformers_image_processor(folder))
        except InputError:
            found.append(None)
    kind = next((type(processor) for processor in found if processor is not None), None)
    if kind is None:
        return None
    try:
        return tuple(
            kind.from_dict(dict(part)) if processor is None else processor
            for processor, part in zip(found, (ours, theirs), strict=True)
        )
    except Exception:  # whatever transformers thinks of a setting, what is written can be compared
        return None


def _effective(processor: Any) -> dict[str, Any]:
    """Return what a processor does, by setting; the settings of steps that it leaves out do not count."""
    settings = {k: v for k, v in processor.to_dict().items() if not _HOUSEKEEPING.fullmatch(k)}
    steps = {"do_resize": ("size", "resample"), "do_center_crop": ("crop_size",)}
    steps |= {"do_rescale": ("rescale_factor",), "do_normalize": ("image_mean", "image_std")}
    idle = {key for step, keys in steps.items() if not settings.get(step) for key in keys}
    kept = {k: v for k, v in settings.items() if v is not None and v is not False and k not in idle}
    return {k: _plain(v) for k, v in kept.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {key: part for key, part in value.items() if part is not None}
    return list(value) if isinstance(value, tuple) else value


def _acts_alike(a: Any, b: Any) -> bool:
    """Compare what two processors make of an image that no step leaves as it is."""
    settings = _effective(a), _effective(b)
    if max(_sizes(settings), default=0) > _LARGEST or (settings[0] == settings[1] and type(a) is type(b)):
        return settings[0] == settings[1]
    pixels = torch.randint(0, 256, (150, 200, 3), generator=torch.Generator().manual_seed(0))
    image = PIL.Image.fromarray(pixels.to(torch.uint8).numpy())
    try:
        first, second = (processor(image, return_tensors="pt").pixel_values for processor in (a, b))
    except Exception:  # not of one image alone: their settings tell
        return settings[0] == settings[1]
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), atol=1e-4)


def _sizes(settings: tuple[dict[str, Any], ...]) -> Iterator[float]:
    """List the numbers of pixels that processors' settings ask for."""
    for size in (part.get(key) for part in settings for key in ("size", "crop_size")):
        numbers = size.values() if isinstance(size, dict) else [size]
        yield from (number for number in numbers if isinstance(number, int | float))


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
            "Do image_mean and image_std have one value for each channel, and do_convert_rgb false for grey?",
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
