"""`adamerge merge`: from files to files, whole or not at all."""

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
import yaml
from conftest import TASKS, tiny_config, write_clip
from processes import exit_code, kill_after, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import adamerge
from adamerge.cli import main
from adamerge.ownership import LIST
from adamerge.static import METHODS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


def arguments(clip: Path, *tasks: str) -> list[str]:
    experts = [f"--experts={task}={clip / 'experts' / task}.safetensors" for task in tasks or TASKS]
    return ["--base", str(clip / "base"), *experts]


def merged(out: Path) -> dict[str, Tensor]:
    return load_file(out / "open_clip_model.safetensors")


def in_python(clip: Path, method: str, **options: object) -> dict[str, Tensor]:
    experts = {task: clip / "experts" / f"{task}.safetensors" for task in TASKS}
    return adamerge.merge(adamerge.TaskVectors.open(clip / "base", experts), method, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model in several shards, with tied embeddings, and two experts in single files."""
    root = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(root / "base", max_shard_size="8KB")
    (root / "base" / "tokenizer_config.json").write_text("{}")
    for seed, name in enumerate(("poet", "clerk"), 1):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.add_(0.01 * noise)
        model.save_pretrained(root / name, max_shard_size="1GB")
    return root


class TestOutput:
    @pytest.mark.parametrize(
        ("method", "given", "options"),
        [
            ("average", [], {}),
            ("ties", ["--density", "0.5", "--aggregate", "mean"], {"density": 0.5, "aggregate": "mean"}),
            (
                "lines",
                ["--of", "ties", "--of_options.density", "0.5"],
                {"of": "ties", "of_options": {"density": 0.5}},
            ),
        ],
    )
    def test_it_writes_what_python_gives(
        self, clip: Path, tmp_path: Path, method: str, given: list[str], options: dict[str, object]
    ) -> None:
        assert main(["merge", method, *arguments(clip), *given, "--out", str(tmp_path / "out")]) == 0
        expected = in_python(clip, method, **options)
        for name, tensor in merged(tmp_path / "out").items():
            assert_close(tensor, expected[name], rtol=0, atol=0)

    def test_open_clip_loads_it(self, clip: Path, tmp_path: Path) -> None:
        main(["merge", "average", *arguments(clip), "--out", str(tmp_path / "out")])
        model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
        expected = in_python(clip, "average")["visual.proj"]
        assert torch.equal(model.visual.state_dict()["proj"], expected)

    def test_transformers_loads_it_in_the_bases_own_shards(self, llama: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        experts = [f"--experts={name}={llama / name}" for name in ("poet", "clerk")]
        given = ["--base", str(llama / "base"), *experts, "--scale", "1", "--dtype", "bfloat16"]
        assert main(["merge", "task_arithmetic", *given, "--out", str(out)]) == 0
        names = {path.name for path in (llama / "base").iterdir()} | {"README.md", LIST}
        assert {path.name for path in out.iterdir()} == names
        assert sum(name.endswith(".safetensors") for name in names) >= 3
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype="auto", output_loading_info=True
        )
        assert model.dtype == torch.bfloat16
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        models = [
            transformers.AutoModelForCausalLM.from_pretrained(llama / n) for n in ("base", "poet", "clerk")
        ]
        base, poet, clerk = (m.model.norm.weight for m in models)
        assert_close(model.model.norm.weight, (poet + clerk - base).bfloat16(), rtol=0, atol=0)

    def test_a_file_becomes_a_file(self, clip: Path, tmp_path: Path) -> None:
        base = clip / "base" / "open_clip_model.safetensors"
        given = ["--base", str(base), *arguments(clip)[2:], "--out", str(tmp_path / "out.safetensors")]
        assert main(["merge", "average", *given]) == 0
        expected = in_python(clip, "average")
        assert_close(load_file(tmp_path / "out.safetensors"), expected, rtol=0, atol=0)

    def test_card_and_metadata_name_method_options_and_inputs(self, clip: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        main(
            ["merge", "ties", *arguments(clip), "--density", "0.4", "--edit", "ties_trim", "--out", str(out)]
        )
        _, front, text = (out / "README.md").read_text().split("---\n", 2)
        assert "base_model" not in yaml.safe_load(front)  # local paths mean nothing to the hub
        assert f"- base: `{clip / 'base'}`" in text
        assert "merge" in yaml.safe_load(front)["tags"]
        assert text.count("SHA-256") == 1 + len(TASKS)
        with safe_open(out / "open_clip_model.safetensors", "pt") as file:
            recipe = json.loads(file.metadata()["adamerge"])
        assert recipe["method"] == "ties"
        assert recipe["options"] == {"density": 0.4, "aggregate": "sum", "scale": 0.3}
        assert recipe["edit"] == {"ties_trim": {}}
        assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == recipe

    def test_an_oracle_writes_the_model_of_one_task(self, clip: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert main(["merge", "emr", *arguments(clip), "--out", str(out)]) == 2
        assert main(["merge", "emr", *arguments(clip, "bars"), "--task", "bars", "--out", str(out)]) == 0
        expert = load_file(clip / "experts" / "bars.safetensors")
        assert_close(merged(out)["visual.proj"], expert["visual.proj"])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.statistics])
def test_every_method_is_a_command(clip: Path, tmp_path: Path, method: str) -> None:
    assert main(["merge", method, *arguments(clip, "bars", "dots"), "--out", str(tmp_path / "out")]) == 0
    assert merged(tmp_path / "out")["visual.conv1.weight"].isfinite().all()


class TestInputsAreSafe:
    """No output replaces an input, or a folder of something else."""

    @pytest.mark.parametrize("place", ["base", "base/inside", "experts", "experts/dots.safetensors", ""])
    def test_from_an_output_in_their_place(self, clip: Path, tmp_path: Path, place: str) -> None:
        root = shutil.copytree(clip, tmp_path / "clip")
        before = {path: path.read_bytes() for path in root.rglob("*.safetensors")}
        given = [*arguments(root, "dots"), "--out", str(root / place), "--overwrite"]
        assert main(["merge", "average", *given]) == 2
        assert {path: path.read_bytes() for path in root.rglob("*.safetensors")} == before

    def test_and_so_is_what_is_no_model(self, clip: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter").write_text("precious")
        given = [*arguments(clip), "--out", str(tmp_path / "thesis"), "--overwrite"]
        assert main(["merge", "average", *given]) == 2
        assert (tmp_path / "thesis" / "chapter").read_text() == "precious"


class TestBadInput:
    """The message, the exit code, and nothing written."""

    def refused(self, capsys: pytest.CaptureFixture[str], out: Path, *given: str) -> str:
        assert main(["merge", "average", *given, "--out", str(out)]) == 2
        assert not out.exists()
        assert not [path for path in out.parent.iterdir() if "tmp" in path.name]
        return capsys.readouterr().err

    @pytest.fixture
    def faulty(self, clip: Path, tmp_path: Path):
        """Make an expert whose tensors were changed by a function."""

        def make(change) -> list[str]:
            state = load_file(clip / "experts" / "dots.safetensors")
            change(state)
            save_file(state, tmp_path / "faulty.safetensors")
            return [*arguments(clip, "bars"), f"--experts=faulty={tmp_path / 'faulty.safetensors'}"]

        return make

    def test_nan(self, capsys, tmp_path: Path, faulty) -> None:
        given = faulty(lambda state: state["visual.proj"][1, 2].fill_(torch.nan))
        message = self.refused(capsys, tmp_path / "out", *given)
        assert "expert 'faulty': 1 non-finite value(s) in visual.proj, first at [1, 2]" in message

    def test_another_base(self, capsys, tmp_path: Path, faulty) -> None:
        given = faulty(lambda state: [tensor.mul_(-3) for tensor in state.values()])
        message = self.refused(capsys, tmp_path / "out", *given)
        assert "['faulty'] are farther from the base than the base is long" in message
        assert "--force" in message
        assert main(["merge", "average", *given, "--out", str(tmp_path / "out"), "--force"]) == 0

    def test_another_shape(self, capsys, tmp_path: Path, faulty) -> None:
        given = faulty(lambda state: state.update({"visual.proj": torch.zeros(3, 3)}))
        message = self.refused(capsys, tmp_path / "out", *given)
        assert "visual.proj" in message
        assert (
            main(["merge", "average", *given, "--out", str(tmp_path / "o"), "--exclude", "visual.proj"]) == 0
        )

    def test_all_vectors_zero(self, capsys, clip: Path, tmp_path: Path) -> None:
        given = ["--base", str(clip / "base"), f"--experts=same={clip / 'base'}"]
        assert "no expert differs" in self.refused(capsys, tmp_path / "out", *given)

    @pytest.mark.filterwarnings("ignore:experts 'a' and 'b' are equal")
    def test_the_same_expert_twice_is_told(self, clip: Path, tmp_path: Path) -> None:
        path = clip / "experts" / "bars.safetensors"
        given = ["--base", str(clip / "base"), f"--experts=a={path}", f"--experts=b={path}"]
        with pytest.warns(adamerge.errors.AdamergeWarning, match="'a' and 'b' are equal"):
            main(["merge", "average", *given, "--out", str(tmp_path / "out")])

    def test_names(self, capsys, clip: Path, tmp_path: Path) -> None:
        out, path = tmp_path / "out", clip / "experts" / "bars.safetensors"
        base = ["--base", str(clip / "base")]
        assert "two experts are called 'a'" in self.refused(
            capsys, out, *base, f"--experts=a={path}", f"--experts=a={path}"
        )
        assert "expert name 'a/b' cannot be a file name" in self.refused(
            capsys, out, *base, f"--experts=a/b={path}"
        )
        assert "has no name or no path" in self.refused(capsys, out, *base, f"--experts={path}")
        assert "does not exist" in self.refused(capsys, out, *base, "--experts=a=nowhere.safetensors")

    def test_options_that_would_do_nothing(self, capsys, clip: Path, tmp_path: Path) -> None:
        out, given = tmp_path / "out", arguments(clip)
        assert "matches visul.*" in self.refused(capsys, out, *given, "--exclude", "visul.*")
        assert "without an edit" in self.refused(capsys, out, *given, "--edit_options.density", "0.5")

    def test_an_existing_output(self, capsys, clip: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert main(["merge", "average", *arguments(clip), "--out", str(tmp_path / "out")]) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert not list((tmp_path / "out").iterdir())

    def test_a_value_that_the_output_dtype_cannot_hold(self, capsys, tmp_path: Path) -> None:
        base, expert = {"w": torch.full((3,), 6e4)}, {"w": torch.tensor([7e4, 6e4, 6e4])}
        save_file(base, tmp_path / "base.safetensors")
        save_file(expert, tmp_path / "a.safetensors")
        given = ["--base", f"{tmp_path}/base.safetensors", f"--experts=a={tmp_path}/a.safetensors"]
        assert main(["merge", "average", *given, "--out", str(tmp_path / "out"), "--dtype", "float16"]) == 4
        assert "bfloat16" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_help_lists_every_method_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in METHODS)
    with pytest.raises(SystemExit):
        main(["merge", "ties", "--help"])
    assert "--density" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_the_old_output_or_the_new_one(clip: Path, tmp_path: Path) -> None:
    out, tries = tmp_path / "out", random.Random(0)
    main(["merge", "average", *arguments(clip), "--out", str(out)])
    old, new = merged(out), in_python(clip, "task_arithmetic")
    command, log = ["merge", "task_arithmetic", *arguments(clip), "--overwrite", "--out"], tmp_path / "log"
    for _ in range(2):  # the first process waits until the server has imported everything
        began = time.monotonic()
        assert exit_code(start([*command, str(tmp_path / "timed")], log)) == 0
        duration = time.monotonic() - began
    outcomes = []
    for _ in range(10):
        kill_after(start([*command, str(out)], log), duration * tries.uniform(0.1, 1.1))
        found = merged(out)
        outcomes.append(torch.equal(found["visual.proj"], new["visual.proj"]))
        expected = new if outcomes[-1] else old
        assert_close(found, {name: expected[name] for name in found}, rtol=0, atol=0)
    assert main(["merge", "average", *arguments(clip), "--overwrite", "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []  # leftovers are swept


def test_a_full_disk_leaves_the_old_output(clip: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (clip / "base").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        out = disk / "out"
        assert main(["merge", "average", *arguments(clip), "--out", str(out)]) == 0
        old = {name: tensor.clone() for name, tensor in merged(out).items()}  # an open map keeps a disk busy
        assert main(["merge", "ties", *arguments(clip), "--out", str(out), "--overwrite"]) == 5
        assert all(torch.equal(tensor, old[name]) for name, tensor in merged(out).items())
        assert [path.name for path in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_nothing_is_left_to_merge(capsys: pytest.CaptureFixture[str], clip: Path, tmp_path: Path) -> None:
    for method in ("average", "ties"):
        given = [*arguments(clip), "--exclude", "*", "--out", str(tmp_path / "out")]
        assert main(["merge", method, *given]) == 2
        assert "no tensor is left to merge" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_an_inner_option_of_the_wrong_type_is_refused(
    capsys: pytest.CaptureFixture[str], clip: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "out")]
    of = ["lines", "--of", "ties", "--of_options.density", "much"]
    edit = ["average", "--edit", "ties_trim", "--edit_options.density", "much"]
    for given in (of, edit):
        assert main(["merge", *given, *arguments(clip), *out]) == 2
        assert "density='much' has the wrong type" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_open_clip_experts_of_another_activation_are_refused(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    config["model_cfg"]["quick_gelu"] = True
    write_clip(tmp_path / "quick", seed=1, config=config)
    given = ["--base", str(clip / "base"), "--experts", f"cars={tmp_path / 'quick'}"]
    command = ["merge", "average", *given, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "activation differs: base gelu, expert 'cars' quick_gelu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.warns(
        adamerge.errors.AdamergeWarning, match=r"differs: base .* By force, the base's setting stands"
    ):
        assert main([*command, "--force"]) == 0  # as the refusal says
