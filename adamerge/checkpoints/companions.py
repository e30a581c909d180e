"""The files of a model folder that are not its weights, and that its library needs all the same."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from adamerge.checkpoints.diagnosis import PICKLES
from adamerge.checkpoints.modules import read_modules

_WEIGHTS = (  # in any library's form: the base's would be read in the place of the merged ones
    *(*PICKLES, ".safetensors", ".h5", ".keras", ".msgpack", ".gguf", ".ggml", ".npz", ".npy", ".ot"),
    *(".onnx", ".onnx_data", ".tflite", ".pb", ".mlmodel", ".mlpackage", ".pdparams", ".nemo", ".engine"),
    *(".tar", ".tgz", ".gz", ".zip", ".xml"),
)
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".ipynb")
_OWN = (
    "README.md",
    "adamerge.json",
    "adapter_config.json",
    "trainer_state.json",
)  # of the model that was copied from
_LOGS = "events.out.tfevents."


def copy_companions(source: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy what a library needs beside the weights: configuration, tokenizer, processor, further modules.

    Weights in any form, adapters, code, model cards, hidden files and logs of trainings stay behind. A
    sub-folder is copied without code where it holds no weights, and with them where ``modules.json`` names
    it as a part of a sentence-transformers model.

    Args:
        source: The model folder.
        folder: Where the copies go; it exists.
        dtype: The dtype that the copied ``config.json`` names; default: what it named before.
    """
    for name in companions_of(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    config = folder / "config.json"
    if dtype is not None and config.exists():
        settings = json.loads(config.read_text(encoding="utf-8"))
        names = [key for key in ("dtype", "torch_dtype") if key in settings]
        named = dict.fromkeys(names, str(dtype).removeprefix("torch."))
        config.write_text(json.dumps(settings | named, indent=2) + "\n", encoding="utf-8")


def companions_of(source: Path) -> list[str]:
    """List the files that `copy_companions` copies, by their paths below the folder."""
    entries = sorted(path for path in source.iterdir() if not path.name.startswith("."))
    names = [path.name for path in entries if path.is_file() and not _is_weights(path.name)]
    names = [name for name in names if name not in _OWN]
    modules = module_folders(source)
    for path in entries:
        inner = sorted(_files_below(source, path.name)) if path.is_dir() else []
        if path.name in modules:
            names += _without_pickled_twins(inner)
        elif not any(_is_weights(name) for name in inner):
            names += inner
    return [name for name in names if not name.endswith(_CODE) and not Path(name).name.startswith(_LOGS)]


def _is_weights(name: str) -> bool:
    name = name.lower()
    return name.endswith((*_WEIGHTS, ".index.json")) or name.startswith("adapter_model.")


def _files_below(source: Path, folder: str) -> Iterator[str]:
    """List regular files below a sub-folder; links to further folders are not followed."""
    for root, folders, files in os.walk(source / folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        inside = (Path(root) / name for name in files if not name.startswith("."))
        yield from (path.relative_to(source).as_posix() for path in inside if path.is_file())


def _without_pickled_twins(names: list[str]) -> list[str]:
    """Leave out other forms of a module's weights where its safetensors are there, which libraries prefer."""
    safe = {str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors")}
    twins = {n for n in names if str(PurePosixPath(n).parent) in safe and not n.endswith(".safetensors")}
    return [name for name in names if name not in twins or not _is_weights(name)]


def module_folders(source: Path) -> set[str]:
    """Return the sub-folders of a sentence-transformers model; paths that lead elsewhere are not its own."""
    named = [module.get("path") for module in read_modules(source)]
    paths = [PurePosixPath(path) for path in named if isinstance(path, str) and path]
    return {path.parts[0] for path in paths if not path.is_absolute() and ".." not in path.parts}
