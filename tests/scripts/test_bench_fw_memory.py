"""The benchmark of FW-Merging's memory gives one line for every case."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_one_json_line_a_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = SimpleNamespace(**runpy.run_path(str(SCRIPTS / "bench_fw_memory.py")))

    def here(args: argparse.Namespace, codec: str, count: int) -> dict[str, Any]:
        return bench.measured(argparse.Namespace(**vars(args) | {"codecs": [codec], "experts": [count]}))

    monkeypatch.setitem(bench.main.__globals__, "child", here)  # a fresh process costs ten seconds
    options = ["--model", "tiny", "--experts", "2", "3", "--codecs", "stream", "bf16", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--steps", "1", "--folder", str(tmp_path), "--json"])
    bench.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cases = [(codec, count) for codec in ("stream", "bf16") for count in (2, 3)]
    assert [(row["codec"], row["experts"]) for row in rows] == cases
    assert all(0 < row["imports_rss_mib"] <= row["peak_rss_mib"] for row in rows)
    assert all(row["seconds_per_step"] > 0 for row in rows)
    assert len(list((tmp_path / "tiny").iterdir())) == 1 + 3
