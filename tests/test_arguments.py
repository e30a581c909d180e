"""Signatures as command lines, typed as people type them."""

from typing import Any

import pytest

from adamerge.arguments import parse
from adamerge.errors import InputError


def work(
    base: str, experts: list[str], scale: float = 0.3, skip: list[str] | None = None, force: bool = False
) -> None:
    """Work on experts.

    Args:
        base: Where it begins.
        experts: What is added.
        scale: How much.
        skip: What is left out.
        force: Whatever it takes.
    """


def parsed(*given: str) -> dict[str, Any]:
    return parse("work", [work], ["--base", "b", *given])


@pytest.mark.parametrize(
    "given",
    [
        ("--experts", "a=1", "--experts", "b=2"),
        ("--experts", "a=1", "b=2"),
        ("--experts=a=1", "--experts=b=2"),
        ("--experts", '["a=1", "b=2"]'),
    ],
)
def test_a_list_is_repeated_or_written_at_once(given: tuple[str, ...]) -> None:
    assert parsed(*given)["experts"] == ["a=1", "b=2"]


def test_defaults_and_types() -> None:
    expected = {"base": "b", "experts": ["a=1"], "scale": 0.3, "skip": None, "force": False}
    assert parsed("--experts", "a=1") == expected
    assert parsed("--experts", "a=1", "--scale", "1", "--skip", "x*") == expected | {
        "scale": 1,
        "skip": ["x*"],
    }


@pytest.mark.parametrize(
    ("given", "value"),
    [(["--force"], True), (["--force", "true"], True), (["--force=false"], False), ([], False)],
)
def test_a_flag_needs_no_value(given: list[str], value: bool) -> None:
    assert parsed(*given, "--experts", "a=1")["force"] is value
    assert parsed("--experts", "a=1", *given)["force"] is value


def test_hyphens_count_as_underscores() -> None:
    def save(max_size: int = 3) -> None:
        """Save."""

    assert parse("save", [save], ["--max-size", "5"], positional=False) == {"max_size": 5}


def test_one_argument_without_default_is_positional() -> None:
    def verify(folder: str, tolerance: float = 0.0) -> None:
        """Verify."""

    assert parse("verify", [verify], ["runs/a"]) == {"folder": "runs/a", "tolerance": 0.0}


def test_several_functions_share_a_line_without_what_is_not_the_users() -> None:
    def method(vectors: object, *, density: float = 0.2) -> None:
        """Merge."""

    found = parse(
        "m", [method, work], ["--density", "1", "--base", "b", "--experts", "a=1"], skip={method: ["vectors"]}
    )
    assert found["density"] == 1
    assert "vectors" not in found


def test_a_file_gives_options_too(tmp_path: Any) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("base: other\nexperts: [a=1]\nscale: 0.5\n")
    found = parse("work", [work], ["--config", str(file), "--scale", "0.7"])
    assert (found["base"], found["experts"], found["scale"]) == ("other", ["a=1"], 0.7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--experts", "a=1", "--scael", "1"], "unknown key scael.\nDid you mean 'scale'?"),
        (["--experts", "a=1", "--scale", "x"], "scale: expected float, found 'x'"),
        (["--scale", "1"], "required: experts"),
    ],
)
def test_complaints_name_the_reason(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed(*given)
