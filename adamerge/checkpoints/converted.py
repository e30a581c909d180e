"""Hub repositories from before safetensors: their pickled weights are converted once, into the cache."""

import hashlib
import shutil
import warnings
from pathlib import Path

from safetensors.torch import save_file

from adamerge.atomic import atomic_folder
from adamerge.cache import cache_folder, warn_of_damage
from adamerge.checkpoints.contents import choose, tensors_in
from adamerge.checkpoints.layout import PICKLED
from adamerge.checkpoints.pickled import open_pickled, read_all
from adamerge.digests import is_whole, seal, sha256
from adamerge.errors import AdamergeWarning


def with_safetensors(folder: Path, role: str) -> Path:
    """Give a folder like this one whose weights are safetensors; nothing of the pickled file is run.

    Args:
        folder: What was downloaded. Where it holds none of `PICKLED`, it is given back as it is.
        role: Who this is, for the note.

    Raises:
        InputError: The file is damaged, or asks to import what no model needs.
    """
    name = next((name for name in PICKLED if (folder / name).exists()), None)
    if name is None:
        return folder
    source = folder / name
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    row = "\n".join(f"{place} {sha256(path)}" for place, path in files.items())
    target = cache_folder() / "converted" / hashlib.sha256(row.encode()).hexdigest()
    note = target.with_name(f"{target.name}.json")
    if not is_whole(target, note):
        warn_of_damage(target / PICKLED[name])
        message = f"{role} has no safetensors: {name} is converted, without running it, into {target}."
        warnings.warn(message, AdamergeWarning, stacklevel=2)
        with open_pickled(source) as found:
            tensors = read_all(tensors_in(choose(found)[0]), source)
        with atomic_folder(target, overwrite=True, is_cache=True) as made:
            for place, path in files.items():
                if path != source:
                    (made / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, made / place)
            save_file(tensors, made / PICKLED[name], {"format": "pt"})
        seal(target, note)
    return target
