"""The shipped zoo: one small CLIP and an expert for each embedded task, as safetensors.

`scripts/train_zoo.py` made every file; `manifest.json` holds digests, recipe and accuracies.
"""

import json
from pathlib import Path

ZOO = Path(__file__).parent


def base() -> Path:
    """Folder of the pre-trained CLIP, for `open_clip.create_model("local-dir:FOLDER")`."""
    return ZOO / "base"


def experts() -> dict[str, Path]:
    """The fine-tuned image tower (`visual.*` tensors) of every task, in the tasks' order."""
    tasks = json.loads((ZOO / "manifest.json").read_text())["tasks"]
    return {name: ZOO / "experts" / f"{name}.safetensors" for name in tasks}
