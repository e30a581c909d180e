"""Dual encoders of transformers as bases: of head files, and of the library's own classifiers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import examples, image_features, library_inputs, randomised, small_config, write_model
from safetensors.torch import save_file
from torch.testing import assert_close

from adamerge import Router, load, save_mixture
from adamerge.checkpoints import open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.fitting import merge_task
from adamerge.models import open_backbone, open_heads

CLASSIFIERS = {"clip": "CLIPForImageClassification", "siglip": "SiglipForImageClassification"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the library's own


def config(kind: str) -> Any:
    """Configure a small model; the sizes of an image tower that classifies are those of the whole."""
    return small_config(transformers.CONFIG_MAPPING[kind])


def write_classifier(folder: Path, kind: str, seed: int) -> Any:
    """Write a random classifier of images of three classes, and return it."""
    torch.manual_seed(seed)
    own = config(kind)
    own.num_labels = 3
    model = randomised(getattr(transformers, CLASSIFIERS[kind])(own))
    write_model(folder, model, "image")
    return model


@pytest.fixture(params=CLASSIFIERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(kind: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_model(tmp_path / "base", randomised(transformers.AutoModel.from_config(config(kind))), "image")
    return tmp_path / "base"


def test_classifiers_on_a_dual_encoder_read_what_the_library_lets_them_read(
    kind: str, base: Path, tmp_path: Path
) -> None:
    models = {name: write_classifier(tmp_path / name, kind, seed) for seed, name in enumerate("ab", 1)}
    paths = {name: str(tmp_path / name) for name in models}
    tasks = {name: TaskSpec("memory", None, ["x", "y", "z"]) for name in models}
    router = Router() if kind == "clip" else None  # SigLIP repeats a parameter, which routing does not know
    task = merge_task(str(base), paths, tasks, coefficients=router, force=True)
    backbone, images = task.backbone, examples("image")
    batch = torch.stack([backbone.preprocess(image) for image in images])
    for name, model in models.items():
        weights = task.vectors.merge(task.vectors.one_hot(name))
        found = task.heads[name].logits(backbone.features(weights, batch))
        with torch.no_grad():
            expected = model(**library_inputs(tmp_path / name, images)).logits
        assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if task.mixture is not None:
        mixture = task.mixture.eval()
        save_mixture(mixture, tmp_path / "out", like=base)
        assert torch.equal(load(tmp_path / "out").logits(batch, "a"), mixture.logits(batch, "a"))


def test_a_head_file_reads_the_librarys_features_of_images_on_the_unit_sphere(kind: str, base: Path) -> None:
    model = transformers.AutoModel.from_pretrained(base)
    expected = image_features(model, base, examples("image"))
    save_file({"weight": torch.eye(expected.shape[1])}, base.parent / "head.safetensors")
    head = open_heads(base, {"x": TaskSpec("memory", head=str(base.parent / "head.safetensors"))})["x"]
    backbone, state = open_backbone(base), open_checkpoint(base)
    batch = torch.stack([backbone.preprocess(image) for image in examples("image")])
    features = backbone.features({name: state[name] for name in backbone.names}, batch)
    assert_close(head.logits(features), torch.nn.functional.normalize(expected), atol=1e-5, rtol=1e-5)


def test_a_task_without_head_file_is_told_that_it_needs_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_model(tmp_path, transformers.AutoModel.from_config(config("siglip")), "image")
    with pytest.raises(InputError, match="no head file, and zero-shot heads are not made with a SiglipModel"):
        open_heads(tmp_path, {"x": TaskSpec("memory", None, ["a", "b"])})
