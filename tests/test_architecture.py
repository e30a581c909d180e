"""The house keeps its shape: floors, names, registries, and imports that stay light."""

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import adamerge
from adamerge.static import registry

ROOT = Path(__file__).parents[1]


def test_files_import_only_from_floors_below() -> None:
    run = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    found = subprocess.run(
        [sys.executable, "-c", run, "--no-cache"], cwd=ROOT, capture_output=True, check=False
    )
    assert found.returncode == 0, found.stdout.decode()


@pytest.mark.parametrize("name", adamerge.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(adamerge, name).__doc__


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Merger'"):
        adamerge.Merger  # noqa: B018  the access is the test


def test_no_two_methods_share_a_name() -> None:
    def average() -> None:
        """A second method of that name."""

    with pytest.raises(ValueError, match="'average' is registered already"):
        registry.static_method(title="x", source="arXiv:0", scope="tensor")(average)


def test_type_checkers_of_users_see_our_annotations() -> None:
    assert resources.files("adamerge").joinpath("py.typed").is_file()


def test_importing_adamerge_loads_neither_torch_nor_lightning() -> None:
    code = "import sys, adamerge; print([m for m in ('torch', 'pytorch_lightning') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "[]"


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports test files by their names alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
