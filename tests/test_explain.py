"""Complaints of a real parser, made short."""

from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from adamerge.coefficients import Coefficients
from adamerge.data.tasks import TaskSpec
from adamerge.explain import explain

CLASSES = ["adamerge.Entropy", "adamerge.Learned"]


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--mode", type=Literal["sum", "mean"], default="sum")
    parser.add_argument("--trainer.devices", type=int, default=1)
    parser.add_argument("--tasks", type=dict[str, TaskSpec])
    parser.add_subclass_arguments(Coefficients, "coefficients", default={"class_path": "adamerge.Learned"})
    return parser


def explained(parser: ArgumentParser, *arguments: str) -> tuple[str, str]:
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(list(arguments))
    return explain(str(caught.value), parser.get_defaults(skip_validation=True).keys(), CLASSES)


@pytest.mark.parametrize(
    ("arguments", "reason", "hint"),
    [
        ("--stepps 1", "unknown key stepps.", "Did you mean 'steps'?"),
        ("--trainer.devises 1", "unknown key trainer.devises.", "Did you mean 'trainer.devices'?"),
        ("--steps many", "steps: expected int, found 'many'.", ""),
        ("--mode men", "mode=men is not a valid value.", "Did you mean 'mean'?"),
        (
            "--coefficients.groupin task",
            "coefficients: adamerge.Learned has no option 'groupin'.",
            "Did you mean 'grouping'?",
        ),
        ("--step 4", "unknown key step.", "Did you mean 'steps'?"),
        (
            "--coefficients.grouping tensr",
            "coefficients.grouping=tensr is not a valid value.",
            "Did you mean 'tensor'?",
        ),
        (
            "--coefficients adamerge.Lerned",
            "coefficients: there is no class 'adamerge.Lerned'.",
            "Did you mean 'adamerge.Learned'?",
        ),
        (
            "--coefficients ademerge.Learned",
            "coefficients: there is no class 'ademerge.Learned'.",
            "Did you mean 'adamerge.Learned'?",
        ),
        (
            "--coefficients Lerned",
            "coefficients: there is no class 'Lerned'.",
            "Did you mean 'adamerge.Learned'?",
        ),
        (
            '--tasks {"cars":{"adapt":"x","tset":"y"}}',
            "tasks: adamerge.TaskSpec has no option 'tset'.",
            "Did you mean 'test'?",
        ),
    ],
)
def test_of_an_argument(parser: ArgumentParser, arguments: str, reason: str, hint: str) -> None:
    assert explained(parser, *arguments.split()) == (reason, hint)


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ("stpes: 3", "unknown key stpes.", "Did you mean 'steps'?"),
        ("steps: {x: 3}", "steps: expected int, found \"{'x': 3}\".", ""),
        ("trainer: {devises: 1}", "unknown key trainer.devises.", "Did you mean 'trainer.devices'?"),
        ("zzzzzz: 1", "unknown key zzzzzz.", "Known: "),
        ("a: [", "Problems parsing config: while parsing a flow node", ""),
    ],
)
def test_of_a_file(parser: ArgumentParser, tmp_path: Path, text: str, reason: str, hint: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    found = explained(parser, "--config", str(tmp_path / "c.yaml"))
    assert found[0].startswith(reason)
    assert found[1].startswith(hint)


def test_of_a_nested_key_of_a_plain_value() -> None:
    complaint = "Group 'data' does not accept nested key 'sed'"
    assert explain(complaint, ["data.seed"], ()) == ("unknown key data.sed.", "Did you mean 'data.seed'?")


def test_of_an_option_that_a_callable_lacks() -> None:
    complaint = (
        'Parser key "model.optimizer": Type collections.abc.Callable[[int], int] expects a function: Option '
        "'learning_rate' is not accepted. Got value: Namespace(class_path='torch.optim.Adam', init"
    )
    reason, hint = explain(complaint, (), CLASSES)
    assert reason == "model.optimizer: torch.optim.Adam has no option 'learning_rate'."
    assert hint.startswith("Known: ")
    assert " lr," in hint


def test_of_a_class_of_another_kind(parser: ArgumentParser) -> None:
    reason, hint = explained(parser, "--coefficients", "adamerge.Entropy")
    assert (reason, hint) == ("coefficients=adamerge.Entropy is no Coefficients.", "Known: adamerge.Learned.")


def test_of_a_required_value_that_nobody_gave() -> None:
    complaint = "Parser key \"model.base\":\n  Expected a <class 'str'>. Got value: None"
    assert explain(complaint, (), ()) == ("model.base is missing.", "Give it in a file: --config FILE.yaml")


def test_what_is_not_understood_is_passed_on_in_one_line() -> None:
    reason, hint = explain("first\n\n  - second " + "x" * 400, (), ())
    assert reason.startswith("first second xxx")
    assert len(reason) == 300
    assert hint == ""
