"""W&B is a guest: offline by default, and its failures stay its own."""

from pathlib import Path

import pytest
import torch
from builders import adapt, make_task, memory_data

from adamerge import tracking
from adamerge.callbacks import CoefficientReport
from adamerge.errors import AdamergeWarning, EnvironmentProblem
from adamerge.tracking import SafeWandbLogger, can_go_online

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_without_a_key_it_is_offline_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_answers", lambda *_: pytest.fail("no host may be asked"))
    assert not can_go_online()


def test_a_key_without_a_reachable_host_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not can_go_online()


def test_a_key_in_netrc_and_a_host_that_answers_is_online(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setattr(tracking, "_answers", lambda host, port: (host, port) == ("api.wandb.ai", 443))
    assert can_go_online()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not can_go_online()


def test_an_online_run_keeps_its_id_across_a_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = (SafeWandbLogger(str(tmp_path), offline=False) for _ in range(2))
    assert first._wandb_init["id"] == second._wandb_init["id"]
    assert first._wandb_init["resume"] == "allow"


def test_a_failing_run_warns_once_and_adaptation_goes_on(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("the host is gone")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = SafeWandbLogger(str(tmp_path))
    with pytest.warns(
        AdamergeWarning, match="W&B failed and is off for this run: the host is gone"
    ) as caught:
        learned = adapt(
            make_task(clip),
            memory_data(),
            3,
            CoefficientReport(tmp_path, 1),
            logger=logger,
            log_every_n_steps=1,
        )
    assert len([w for w in caught if issubclass(w.category, AdamergeWarning)]) == 1
    assert torch.equal(learned, adapt(make_task(clip), memory_data(), 3))


def test_a_method_that_fails_later_is_silenced(tmp_path: Path) -> None:
    class Breaks(SafeWandbLogger):
        @tracking._guarded
        def log_table(self, *_: object, **__: object) -> None:
            raise OSError("pipe closed")

    logger = Breaks(str(tmp_path))
    with pytest.warns(AdamergeWarning, match="pipe closed"):
        logger.log_table()
    logger.log_table()


def test_without_wandb_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install wandb"):
        SafeWandbLogger()


def test_an_offline_run_holds_losses_heat_map_and_table(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = SafeWandbLogger(str(tmp_path), name="run")
    assert "anonymous" not in logger._wandb_init  # of which wandb would warn
    adapt(
        make_task(clip), memory_data(), 2, CoefficientReport(tmp_path, 1), logger=logger, log_every_n_steps=1
    )
    logger.experiment.finish()
    media = tmp_path / "wandb" / "latest-run" / "files" / "media"
    assert list(media.rglob("*.png"))
    assert list(media.rglob("*.table.json"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert SafeWandbLogger(str(tmp_path))._wandb_init["mode"] == "disabled"
