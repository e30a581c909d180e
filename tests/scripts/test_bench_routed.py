"""The benchmark of routed models: figures that others read are there and consistent."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ["--batch", "8", "--loop", "3", "--repeats", "2", "--threads", "1", "--json"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "bench_routed.py")))


def run(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["bench_routed.py", *TINY, *options])
    bench.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", ["tiny", "zoo"])
def test_one_line_of_json_gives_rates_and_memory(bench, monkeypatch, capsys, model: str) -> None:
    found = run(bench, monkeypatch, capsys, "--model", model, "--experts", "4", "--rank", "0.2")
    assert (found["model"], found["experts"], found["rank"], found["batch"]) == (model, 4, 0.2, 8)
    assert found["loop_images"] == 3
    for way in ("static", "per_sample", "expanding"):
        expected = found["routed_img_s"] / found[f"{way}_img_s"]
        assert found[f"routed_over_{way}"] == pytest.approx(expected)
        assert found[f"routed_over_{way}_cpu"] > 0
    assert found["with_router_img_s"] > 0
    assert found["max_abs_diff"] < 1e-5 < found["spread"]
    assert found["peak_rss_mib"] > found["routed_mib"]


@pytest.mark.parametrize("codec", ["bf16", "magnitude"])
def test_any_codec_is_measured(bench, monkeypatch, capsys, codec: str) -> None:
    found = run(bench, monkeypatch, capsys, "--model", "tiny", "--codec", codec)
    assert found["codec"] == codec
    assert found["max_abs_diff"] < 1e-5 < found["spread"]


def test_the_towers_have_the_sizes_that_they_are_named_for(bench) -> None:
    suite, large = bench.TOWERS["suite"], bench.TOWERS["vit-b-32"]
    assert (suite["width"], suite["layers"], suite["width"] // suite["heads"]) == (128, 6, 32)
    assert (suite["image_size"] // suite["patch_size"]) ** 2 + 1 == 17
    assert (large["width"], large["layers"], large["patch_size"]) == (768, 12, 32)


def test_random_experts_are_stored_at_the_rank_that_the_codec_would_keep(bench) -> None:
    options = {"experts": 3, "rank": 0.2, "codec": "low_rank", "model": "tiny"}
    vectors, _, _ = bench.random_exclusives(SimpleNamespace(**options))
    codec = bench.codec_of(SimpleNamespace(**options))
    for block in vectors.blocks.values():
        base = block.base_tensor()
        assert type(block) is type(codec.encode(base, block.dense()))
        assert getattr(block, "ranks", None) == getattr(codec.encode(base, block.dense()), "ranks", None)
        assert 0.5e-3 < block.dense().std() < 2e-3
