"""The `adamerge` command: answers --help at once, and imports what a subcommand needs only then."""

import errno
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from adamerge import __version__, interrupts
from adamerge.errors import AdamergeError, AdamergeWarning, EnvironmentProblem, InputError, nearest

_LIGHTNING = ("fit", "validate", "test", "predict")
_COMMANDS = {
    "fit": "learn merging coefficients on unlabelled inputs, evaluate, write the merged model",
    "validate": "label-free measures on held-out adaptation images (--ckpt_path last)",
    "test": "accuracy on labelled test images (--ckpt_path last)",
    "predict": "class and probability of each image: --model FOLDER --data IMAGES --out FILE.parquet",
    "merge": "merge checkpoints by a static method: adamerge merge METHOD --base B --experts name=path ...",
    "export": "write a merged classifier as a plain checkpoint: adamerge export RUN --task NAME --out DIR",
    "inspect": "look at base and experts before merging: --base B --experts name=path ...",
    "compress": "store an expert as a ternary task vector: --base B --expert PATH --out FILE",
    "decompress": "give the checkpoint of a compressed expert: --base B --file FILE --out DIR",
    "convert": "write an old pickled checkpoint as safetensors, without running it: adamerge convert OLD",
    "data": "count and check a benchmark's images: adamerge data check --benchmark clip8",
    "bench": "a table of methods on one benchmark: adamerge bench run clip8 --backbone ViT-B-32",
    "evolve": "search which blocks of several models run, in which order: adamerge evolve BENCHMARK",
    "table": "one table of several runs: adamerge table RUN RUN ...",
    "demo": "merge the shipped experts by every method; writes runs/demo/",
    "verify": "re-hash a finished run: adamerge verify RUN",
    "reproduce": "run a finished run again and compare: adamerge reproduce RUN",
}
_MODULES = {"demo": "runs", "verify": "runs", "reproduce": "runs", "decompress": "compress"}
_USAGE = "usage: adamerge [--help] [--version] COMMAND ..."
_KNOWN: dict[str, AdamergeError] = {
    "OutOfMemoryError": EnvironmentProblem(
        "the GPU's memory is full.",
        "Lower data.batch_size or model.images_per_pass, or store vectors with --model.codec bf16.",
    ),
    "UnpicklingError": InputError(
        "the checkpoint to resume from is cut off or no checkpoint.", "Start afresh."
    ),
    "OverflowError": InputError("an option is larger than fp32 can hold.", "Look at the learning rate."),
}
INTERRUPTED = interrupts.EXIT_CODE
_WIDEST = 600  # characters of a line of a message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; default: those of the process.

    Returns:
        0 done; 2 wrong configuration or input; 3 wrong data; 4 a value stopped being finite; 5 the
        machine lacks something; 130 interrupted, can be resumed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    plain, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        with interrupts.handled(lambda: _how_to_resume(given), until_exit=arguments is None):
            return _code_of(given)
    finally:
        warnings.formatwarning = plain


def _code_of(given: list[str]) -> int:
    """Run a command; whatever it raises after a signal is the signal's doing."""
    try:
        return _dispatch(given)
    except BaseException as error:
        interrupts.acknowledge()
        if _is_interrupt(error):
            return _complain(_how_to_resume(given), INTERRUPTED)
        known = error if isinstance(error, AdamergeError) else None
        if known is None and isinstance(error, Exception) and not os.environ.get("ADAMERGE_TRACEBACK"):
            known = _known_problem(error)
        if known is None:
            raise
        return _complain(str(known), known.exit_code)


def _is_interrupt(error: BaseException) -> bool:
    by_sigterm = type(error).__name__ == "SIGTERMException"  # Lightning's, not imported here
    by_trainer = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    return isinstance(error, KeyboardInterrupt) or by_sigterm or by_trainer or interrupts.is_received()


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        _print_help()
        return 0
    if given[0] in ("-V", "--version"):
        sys.stdout.write(f"adamerge {__version__}\n")
        return 0
    name, rest = given[0], given[1:]
    if name not in _COMMANDS:
        raise InputError(f"there is no command {name!r}.", nearest(name, _COMMANDS))
    if name in _LIGHTNING and not _is_of_a_folder(name, rest):
        with interrupts.importing():
            from adamerge.fitting import run

        run([name, *rest])
        return 0
    return _run_function(name, rest)


def _is_of_a_folder(name: str, rest: list[str]) -> bool:
    """Tell `predict --model FOLDER ...` from the prediction of a run's tasks, by its configuration."""
    flags = {word.partition("=")[0] for word in rest}
    by_folder = not rest or not flags.isdisjoint(("--model", "--data", "--help", "-h"))
    return name == "predict" and ("--out" in flags or ("--config" not in flags and by_folder))


def _run_function(name: str, rest: list[str]) -> int:
    """Run a plain function of `adamerge.commands`, whose signature is its command line."""
    with interrupts.importing():
        from importlib import import_module

        from adamerge.arguments import parse
        from adamerge.ranges import checked

        module = import_module(f"adamerge.commands.{_MODULES.get(name, name)}")
    if name == "merge":
        return module.run(rest)
    function: Callable[..., int] = getattr(module, name)
    positional = True if name in ("bench", "data") else None
    return checked(function)(**parse(f"adamerge {name}", [function], rest, positional=positional))


def _print_help() -> None:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in _COMMANDS.items()]
    sys.stdout.write(
        "\n".join([_USAGE, "", "Learns how to merge fine-tuned models on unlabelled data.", "", *lines])
        + "\n\nadamerge COMMAND --help tells a command's options.\n"
    )


def _format_warning(message: Warning | str, category: type[Warning], *_: Any) -> str:
    """Show our own warnings as one plain line, without the source that raised them."""
    kind = "" if issubclass(category, AdamergeWarning) else f"{category.__name__}: "
    return f"adamerge: warning: {kind}{message}\n"


def _complain(message: str, code: int) -> int:
    if "adamerge.progress" in sys.modules:  # a bar under way would leave its line unfinished
        sys.modules["adamerge.progress"].stop_bars()
    lines = (line if len(line) <= _WIDEST else f"{line[: _WIDEST - 3]}..." for line in message.split("\n"))
    start = "\r" if sys.stderr.isatty() else ""  # over the ^C that a terminal shows
    sys.stderr.write(f"{start}adamerge: " + "\n".join(lines) + "\n")
    return code


def _how_to_resume(given: list[str]) -> str:
    """Return what to do after an interrupt: the command, or words where it is too long to be shown whole."""
    is_fit, names_checkpoint = given[:1] == ["fit"], "--ckpt_path" in given
    words = [*given, "--ckpt_path", "last"] if is_fit and not names_checkpoint else given
    told = f"interrupted. {'Resume' if is_fit else 'Start again'} with: adamerge {shlex.join(words)}"
    if len(told) <= _WIDEST:
        return told
    more = " and --ckpt_path last" if words is not given else ""
    return f"interrupted. {'Resume' if is_fit else 'Start again'} with the same command{more}."


def _known_problem(error: Exception) -> AdamergeError | None:
    """Translate what our libraries raise for causes that a user can mend."""
    text = str(error)
    no_gpu = ("No supported gpu backend found", "No CUDA GPUs are available", "can not run on your system")
    kind = type(error).__name__
    if any(phrase in text for phrase in no_gpu):
        return EnvironmentProblem("a GPU was asked for, and there is none.", "Add --trainer.accelerator cpu")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return EnvironmentProblem("the disk is full.", "Free some space; the last checkpoint is whole.")
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return InputError(f"{error.filename}: {error.strerror}.", "Look at the path and its permissions.")
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return EnvironmentProblem("too many files are open.", "Raise the limit: ulimit -n 4096")
    if "PytorchStreamReader" in text:
        kind = "UnpicklingError"
    if "cannot be converted to type float without overflow" in text:
        kind = "OverflowError"
    if kind == "MisconfigurationException":
        return InputError(text.splitlines()[0])
    return _KNOWN.get(kind)
