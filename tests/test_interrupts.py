"""A signal ends a command with 130 and one line, wherever it arrives; a second one ends it at once."""

import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from adamerge import interrupts

HEAD = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
from adamerge import cli, interrupts
def send(number=signal.{name}): os.kill(os.getpid(), number)
"""


def run(name: str, body: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose command is what the body defines as `work`."""
    program = HEAD.format(name=name) + textwrap.dedent(body)
    program += "\ncli._dispatch = lambda given: work() or 0\nsys.exit(cli.main(['merge', 'ties']))\n"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


SIGNALS = pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
LINE = "adamerge: interrupted. Start again with: adamerge merge ties\n"


@SIGNALS
def test_it_unwinds_what_runs(name: str) -> None:
    done = run(
        name,
        """
        def work():
            try:
                send(); time.sleep(5)
            finally:
                print("cleaned")
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned\n", LINE)


@SIGNALS
def test_while_libraries_are_imported_nothing_can_swallow_it(name: str) -> None:
    done = run(
        name,
        """
        def work():
            with interrupts.importing():
                try:
                    send(); time.sleep(5)
                except BaseException:
                    print("swallowed")
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", LINE)


def test_within_an_import_it_waits_for_its_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "slow.py").write_text("import os, signal, time\nos.kill(os.getpid(), 15)\ntime.sleep(0.3)\n")
    done = run(
        "SIGTERM",
        f"""
        def work():
            sys.path.append({str(folder)!r})
            try:
                import slow
            except BaseException:
                print("swallowed")
            time.sleep(5)
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", LINE)


def test_what_a_finalizer_swallows_is_raised_again() -> None:
    done = run(
        "SIGTERM",
        """
        class Finalized:
            def __del__(self):
                send(); time.sleep(0.01)
        def work():
            Finalized()
            time.sleep(5)
        """,
    )
    assert (done.returncode, done.stderr) == (130, LINE)


@SIGNALS
def test_it_waits_for_the_end_of_a_step(name: str) -> None:
    done = run(
        name,
        """
        def work():
            interrupts.postpone(signal.SIGINT, signal.SIGTERM)
            send(); time.sleep(0.1)
            print("whole")
            interrupts.check()
            print("another step")
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "whole\n", LINE)


def test_a_second_one_ends_it_at_once_and_what_is_temporary_goes() -> None:
    done = run(
        "SIGINT",
        """
        def work():
            interrupts.postpone(signal.SIGINT, signal.SIGTERM)
            with interrupts.cleaning(lambda: print("lock released")):
                send(); time.sleep(0.01); send()  # one Ctrl-C, sent to process and group
                time.sleep(0.5)
                print("still there", flush=True)
                send(); time.sleep(5)
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "still there\nlock released\n", LINE)


def test_an_error_that_follows_a_signal_is_the_signals() -> None:
    done = run(
        "SIGTERM",
        """
        def work():
            try:
                send(); time.sleep(5)
            except KeyboardInterrupt as error:
                raise ImportError("swallowed by a library") from error
        """,
    )
    assert (done.returncode, done.stderr) == (130, LINE)


def test_a_forked_worker_ends_as_if_no_handler_were_there() -> None:
    done = run(
        "SIGTERM",
        """
        def work():
            child = os.fork()
            if child == 0:
                time.sleep(5); os._exit(1)
            time.sleep(0.1)
            os.kill(child, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    )
    assert (done.returncode, done.stdout) == (0, "-15\n")


def test_handlers_are_those_of_before_and_other_threads_have_none() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.handled(str):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    codes: list[bool] = []

    def elsewhere() -> None:
        with interrupts.handled(str):
            codes.append(signal.getsignal(signal.SIGTERM) == before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert codes == [True]
