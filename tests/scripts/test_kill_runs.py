"""The script that kills commands, on a few of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import REPOSITORY


@pytest.mark.slow
@pytest.mark.no_cover
def test_what_a_kill_leaves_is_whole_and_can_be_completed(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "kill_runs.py"), "--json", "--kills", "6"]
    command += ["--folder", str(tmp_path / "kills"), "--temporary", str(tmp_path / "temporary")]
    command += ["--only", "fit adamerging_task_wise", "merge", "convert"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert [row["kills"] for row in rows] == [2, 2, 2]
    assert not any(row["wrong"] for row in rows)
