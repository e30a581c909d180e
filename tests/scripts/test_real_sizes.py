"""The script that takes real sizes through every step, on a tiny CLIP."""

import json
import subprocess
import sys
from pathlib import Path

from builders import REPOSITORY


def test_a_model_of_the_hubs_form_goes_through_every_step(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "real_sizes.py"),
        "--arch",
        "tiny",
        "--form",
        "hf",
    ]
    command += ["--experts", "2", "--steps", "1", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    for step in ("inspect", "merge", "fit"):
        assert row[f"{step}_s"] > 0
        assert row[f"{step}_peak_mib"] > 100
    [folder] = tmp_path.iterdir()
    assert {path.name for path in (folder / "out").iterdir()} == {"audit", "merged", "fit"}
