"""The benchmark of `adamerge merge` measures what it says, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from builders import REPOSITORY
from safetensors.torch import load_file


def test_one_json_line_a_method(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_merge.py"), "--model", "tiny", "--json"]
    command += ["--folder", str(tmp_path), "--methods", "average", "--repeats", "0", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["model"], row["method"], row["threads"]) == ("tiny", "average", 1)
    assert row["merge_s"] == row["first_s"] > 0
    assert row["ratio"] == row["merge_s"] / row["floor_s"]
    assert 0 < row["imports_rss_mib"] <= row["peak_rss_mib"]
    name = "model.layers.0.mlp.up_proj.weight"
    files = sorted((tmp_path / "tiny").glob("expert*/*.safetensors"))
    experts = [tensors[name].float() for tensors in map(load_file, files) if name in tensors]
    merged = next(
        t[name] for t in map(load_file, (tmp_path / "tiny" / "out").glob("*.safetensors")) if name in t
    )
    assert len(experts) == 3
    assert torch.allclose(merged.float(), torch.stack(experts).mean(0), atol=0.02)
