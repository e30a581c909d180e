"""The one file that lets transformers, open_clip and timm read model folders, whose code never runs.

Every call says so (``trust_remote_code=False``), reads local files alone, and is given only settings that
are known to be data. What asks for code is refused by name before a library sees it.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adamerge.checkpoints.foreign_code import require_no_code
from adamerge.documents import read_object
from adamerge.errors import InputError, shortlist
from adamerge.models.base import without_values

_OPEN_CLIP, _CONFIG = "open_clip_config.json", "config.json"
_NO_TEXT: Any = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 1, "context_length": 1}
_OURS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_TIMM_LOADERS = (  # arguments of timm that name other files, models or functions
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_custom_load"),
    *("pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "cache_dir", "model_name"),
)


def transformers_config(folder: Path) -> Any:
    """Read a folder's ``config.json`` by `transformers.AutoConfig`.

    Raises:
        InputError: It asks for code, or transformers cannot read it.
    """
    import transformers

    config = _read(folder, _cannot_read(folder / _CONFIG), transformers.AutoConfig)
    for part in _with_parts(config):
        _leave_kernels_to_the_library(part)
    return config


def transformers_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer by `transformers.AutoTokenizer`.

    Raises:
        InputError: It asks for code, or transformers cannot read it.
    """
    import transformers

    return _read(folder, f"the tokenizer of {folder} cannot be read", transformers.AutoTokenizer)


def clip_tokenizer(folder: Path) -> Any:
    """Read the tokenizer of a Hugging Face CLIP.

    Raises:
        InputError: It asks for code, or transformers cannot read it.
    """
    import transformers

    return _read(folder, f"the tokenizer of {folder} cannot be read", transformers.CLIPTokenizer)


def transformers_image_processor(folder: Path) -> Any:
    """Read a folder's image processor, which works on PIL images.

    Raises:
        InputError: It asks for code, or transformers cannot read it.
    """
    import transformers

    problem = f"the image processor of {folder} cannot be read"
    return _read(folder, problem, transformers.AutoImageProcessor, backend="pil")


def transformers_class(kind: Any, config: Any) -> Any:
    """Return the class that an auto class of transformers chooses for a configuration, or a class itself."""
    import transformers

    if issubclass(kind, transformers.PreTrainedModel):
        return kind
    with torch.device("meta"), _no_questions():
        return type(kind.from_config(config, trust_remote_code=False))


def transformers_model(family: Any, config: Any, state: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
    """Make a model of the library's and fill it from a state in memory; no file is read.

    Returns:
        The model, and the library's report of what it has loaded.
    """
    with quiet(), _no_questions():
        return family.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )


def timm_model(folder: Path, **options: Any) -> Any:
    """Make the timm model that a folder's ``config.json`` describes, without values of a file.

    Args:
        folder: A folder in timm's hub format.
        options: Arguments that override the folder's.

    Raises:
        InputError: It names another model, a file or a function; or timm cannot make it.
    """
    import timm

    require_no_code(folder)
    document, file = read_object(folder / _CONFIG), folder / _CONFIG
    if ":" in str(document.get("architecture")):
        raise InputError(f"{file}: architecture names another model: {document['architecture']!r}.")
    arguments = document.get("model_args") or {}
    loaders = [key for key in arguments if key in _TIMM_LOADERS] if isinstance(arguments, dict) else []
    if loaders:
        raise InputError(f"{file}: model_args asks for other files or models: {shortlist(loaders)}.")
    try:
        with _no_questions():
            if document.get("model_type") != "timm_wrapper":
                return timm.create_model(f"local-dir:{folder}", pretrained=False, **options)
            overlay = document.get("pretrained_cfg") or {}  # transformers writes what timm does not read
            options = {"pretrained": False, "pretrained_cfg_overlay": overlay, **arguments, **options}
            return timm.create_model(document["architecture"], **options)
    except (OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"timm {timm.__version__} cannot build the model of {file}: {error}",
            "Does the file name an architecture of this version, and arguments that it takes?",
        ) from error


def open_clip_image_tower(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Make the image tower that a folder's ``open_clip_config.json`` describes, without values of a file.

    The text tower, whose configuration open_clip may look for on the hub, is not made.

    Returns:
        The tower, and how its images are prepared.

    Raises:
        InputError: It asks for code, or open_clip cannot make it.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    _require_open_clip_data(folder)
    document = read_object(folder / _OPEN_CLIP)
    try:
        model = document["model_cfg"]
        vision: Any = dict(model["vision_cfg"])
        quick = bool(model.get("quick_gelu"))
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        with quiet(), _no_questions():
            whole = without_values(
                lambda: open_clip.CustomTextCLIP(model["embed_dim"], vision, _NO_TEXT, quick_gelu=quick)
            )
        tower: Any = whole.visual
        settings = merge_preprocess_dict(asdict(PreprocessCfg()), document.get("preprocess_cfg", {}))
    except Exception as error:  # whatever open_clip stumbles over, the file is what is wrong
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"open_clip {open_clip.__version__} cannot build the image tower of {folder / _OPEN_CLIP}: "
            f"{type(error).__name__} {reason}",
            "Does the file name an architecture of this version, and settings that it has?",
        ) from error
    return tower, {**settings, "size": _image_size(tower)}


def _image_size(tower: Any) -> Any:
    """Return the size of a tower's images: its own, or that of a timm trunk that reads no other."""
    patches: Any = getattr(getattr(tower, "trunk", None), "patch_embed", None)
    return patches.img_size if getattr(patches, "strict_img_size", False) else tower.image_size


def open_clip_model(folder: Path, *, load_weights: bool, device: str = "cpu") -> Any:
    """Make the model that a folder's ``open_clip_config.json`` describes.

    Args:
        folder: A folder in open_clip's format.
        load_weights: Read the folder's weights, too; pickled ones by tensors alone.
        device: Where it is made; "meta" gives no values.

    Raises:
        InputError: It asks for code, or names another model.
    """
    import open_clip

    _require_open_clip_data(folder)
    with torch.device(device), quiet(), _no_questions():
        name = f"local-dir:{folder}"
        return open_clip.create_model(name, load_weights=load_weights, device=device, weights_only=True)


def open_clip_tokenizer(folder: Path) -> Any:
    """Make the tokenizer that a folder's ``open_clip_config.json`` describes.

    Raises:
        InputError: It asks for code, or for arguments that a tokenizer of open_clip does not have.
    """
    import open_clip

    text = _require_open_clip_data(folder)
    options = _OURS if text.get("hf_tokenizer_name") else {}
    with quiet(), _no_questions():
        return open_clip.get_tokenizer(f"local-dir:{folder}", **options)


def _with_parts(config: Any) -> Iterator[Any]:
    """Walk a configuration and those of its parts, such as towers."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(part)


def _leave_kernels_to_the_library(config: Any) -> None:
    """Take out the kernels that a configuration asks for: they say nothing of what the weights compute.

    FlashAttention needs a GPU and packages, or is compiled code that transformers fetches from the hub.
    """
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, name, None) not in (None, "eager"):
            setattr(config, name, {"": None})  # of this part alone


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' remarks about weights that are loaded in our own way off the screen."""
    from transformers.utils import logging as library

    before, bar = logging.root.manager.disable, library.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    library.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bar:
            library.enable_progress_bar()


def _cannot_read(file: Path) -> str:
    import transformers

    return f"transformers {transformers.__version__} cannot read {file}"


def _read(folder: Path, problem: str, reader: Any, **options: Any) -> Any:
    """Let one of transformers' classes read a folder."""
    require_no_code(folder)
    try:
        with _no_questions():
            return reader.from_pretrained(folder, **_OURS, **options)
    except Exception as error:  # whatever transformers stumbles over, the files are what is wrong
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{problem}: {reason}") from error


def _require_open_clip_data(folder: Path) -> dict[str, Any]:
    """Refuse a configuration that names code, files or other folders, and return its text tower's part."""
    require_no_code(folder)
    file = folder / _OPEN_CLIP
    model = read_object(file).get("model_cfg")
    parts = [model.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    vision, text = (part if isinstance(part, dict) else {} for part in parts or ({}, {}))
    if ":" in str(vision.get("timm_model_name")):
        name = vision["timm_model_name"]
        raise InputError(f"{file}: model_cfg.vision_cfg.timm_model_name names another model: {name!r}.")
    name = text.get("hf_model_name")
    if name and (Path(str(name)).exists() or str(name).startswith((".", "/", "~")) or ":" in str(name)):
        raise InputError(f"{file}: model_cfg.text_cfg.hf_model_name names another folder: {name!r}.")
    options = text.get("tokenizer_kwargs") or {}
    strange = [key for key in options if key not in _tokenizer_options()]
    if strange:
        raise InputError(
            f"{file}: model_cfg.text_cfg.tokenizer_kwargs asks for {shortlist(strange)}.",
            f"What open_clip's tokenizers take is {', '.join(sorted(_tokenizer_options()))}.",
        )
    return text


def _tokenizer_options() -> set[str]:
    """Name the arguments of open_clip's own tokenizers that are data."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    makers: tuple[Callable[..., Any], ...] = (HFTokenizer.__init__, SimpleTokenizer.__init__)
    names = {name for maker in makers for name in inspect.signature(maker).parameters}
    return names - {"self", "kwargs", "tokenizer_name", "cache_dir", "bpe_path"}


@contextmanager
def _no_questions() -> Iterator[None]:
    """Keep transformers, which the others call in turn, from asking on standard input whether to run code."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # it then takes no for an answer
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
