"""Ctrl-C and SIGTERM at any moment: the program ends, in one line, with the signal's own code."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from support import golden
from support.program import grokfetch
from support.release import publish

from grokfetch import interruption
from grokfetch.cli import main
from grokfetch.manifest.shipped import demo_folder

MARK = "begun"
FIRST_LINE = f"""
import sys

def mark(event, arguments):
    if event == "import" and arguments[0] == "grokfetch.interruption":
        sys.stderr.write("{MARK}\\n")
        sys.stderr.flush()

sys.addaudithook(mark)
from grokfetch.__main__ import start
start()
"""
"""The program, which writes a mark when it comes to its first line."""

PATIENCE_S = 60
CONFIG = golden.TINY / "config.json"
LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that is proven by its manifest, and a torrent beside it."""
    root = tmp_path_factory.mktemp("interrupted")
    publish(root)
    grokfetch("fetch", root / "tiny.torrent", "--to", root, *LOOPBACK)
    grokfetch("manifest", root / "release", "--config", CONFIG)
    return root


@pytest.fixture(scope="module")
def silent_peer():
    """A peer that accepts connections and never says anything: a fetch waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield "{}:{}".format(*listening.getsockname())


@pytest.fixture
def commands(folder, tmp_path, silent_peer):
    """Every command, in a form that takes a while or waits for ever, if there is one."""
    release = folder / "release"
    model = ("--dtype", "float32")
    tokenizer = ("--tokenizer", demo_folder() / "grok-demo/tokenizer.model")
    patient = ("--peer", silent_peer, *LOOPBACK)
    return {
        "plan": ("plan", folder / "tiny.json", "--to", tmp_path),
        "fetch": ("fetch", folder / "tiny.torrent", "--to", tmp_path / "out", *patient),
        "status": ("status", release),
        "report": ("report", release, "-o", tmp_path / "page.html"),
        "verify": ("verify", release),
        "inspect": ("inspect", folder / "tiny.torrent", *patient),
        "manifest": ("manifest", release, "--config", CONFIG, "--state", tmp_path / "state"),
        "publish": ("publish", release, "--config", CONFIG, "--output", tmp_path / "published"),
        "export": ("export", release, tmp_path / "exported", "--type", "f32", *tokenizer),
        "seed": ("seed", folder, *LOOPBACK[:-1]),
        "run": ("run", release, "--tokens", "1 2 3", "--max-tokens", "40", *model),
        "serve": ("serve", release, "--port", "0", *model),
        "demo": ("demo",),
    }


def interrupted(arguments, after_s, number=signal.SIGINT):
    """The exit code and stderr of a program that got a signal some time after its first line."""
    command = [sys.executable, "-c", FIRST_LINE, *map(str, arguments)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as child:
        try:
            while MARK not in (line := child.stderr.readline()):
                assert line, "ended before its first line"
            # The test is about the moment, and there is no event to wait for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(after_s)
            ended_before = child.poll() is not None
            child.send_signal(number)
            _, text = child.communicate(timeout=PATIENCE_S)
        finally:
            child.kill()
    # Before the handler is installed, SIGTERM itself ends a program; shells give the same code.
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    return code, text, ended_before


def check(name, code, text, ended_before, number):
    assert "Traceback" not in text, text
    assert "Error" not in text, text
    if ended_before or "no new requests" in text:
        return
    if name == "seed" and "uploaded in" in text:
        # This is how it should end.
        assert code == 0
        return
    # A command that was about to end when the signal came has ended; one that waits for ever has
    # not.
    ends = name not in ("serve", "fetch", "inspect", "seed", "run", "demo")
    assert code == 128 + number or (ends and code == 0), (name, code, text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("name", ["fetch", "serve"])
def test_a_signal_during_start_up_ends_the_program(name, after_s, number, commands):
    check(name, *interrupted(commands[name], after_s, number), number)


def test_every_command_is_among_those_that_are_interrupted(commands):
    assert commands.keys() == set(main.list_commands(None))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(main.list_commands(None)))
def test_no_signal_is_lost_at_any_moment_of_start_up(name, commands, tmp_path):
    times = 40 if name in ("serve", "run") else 12
    # Without jax to import the work has begun much sooner.
    longest_s = 2 if name in ("serve", "run", "demo") else 0.7
    moments = random.Random(name)
    for _ in range(times):
        number = moments.choice([signal.SIGINT, signal.SIGTERM])
        check(name, *interrupted(commands[name], moments.uniform(0, longest_s), number), number)
        for folder_made in ("out", "exported"):
            shutil.rmtree(tmp_path / folder_made, ignore_errors=True)


DROPPED = """
import gc, signal, sys, time
from grokfetch import interruption
interruption.install()

def in_a_callback(phase, info):
    if phase == "start":
        gc.callbacks.clear()
        signal.raise_signal(signal.SIGINT)

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def swallow():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass

# On a busy machine the next attempt may come before the line is written.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
try:
    {how}
    print("dropped", flush=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pass
except KeyboardInterrupt as error:
    sys.exit(interruption.honour(error))
"""


@pytest.mark.parametrize(
    "how",
    ["gc.callbacks.append(in_a_callback); gc.collect()", "Dying()", "swallow()"],
    ids=["garbage collector", "del", "except"],
)
def test_an_interruption_that_is_dropped_is_raised_again(how):
    code = DROPPED.replace("{how}", how)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == "dropped\n"
    assert not done.stderr


def test_one_that_was_dropped_last_of_all_ends_the_program_all_the_same(monkeypatch):
    monkeypatch.setattr(interruption.signal, "setitimer", lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        raise interruption.Interrupted(signal.SIGTERM)
    gc.collect()
    with pytest.raises(interruption.Interrupted) as caught:
        interruption.settle()
    assert interruption.honour(caught.value) == 128 + signal.SIGTERM
    interruption.settle()


def test_one_that_something_else_failed_of_has_its_own_signals_code():
    try:
        try:
            raise interruption.Interrupted(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("what was interrupted fails in its own way") from error
    except ImportError:
        with pytest.raises(interruption.Interrupted) as caught:
            interruption.settle()
    assert interruption.honour(caught.value) == 128 + signal.SIGTERM


def test_a_signal_that_has_had_its_effect_gives_no_later_interruption_its_code():
    with pytest.raises(interruption.Interrupted) as caught:
        raise interruption.Interrupted(signal.SIGTERM)
    assert interruption.honour(caught.value) == 128 + signal.SIGTERM
    assert interruption.honour(KeyboardInterrupt()) == 128 + signal.SIGINT


def test_another_interruption_on_account_of_a_signal_has_the_signals_code():
    try:
        raise interruption.Interrupted(signal.SIGTERM)
    except KeyboardInterrupt as error:
        of_somebody_else = KeyboardInterrupt()
        of_somebody_else.__context__ = error
    assert interruption.honour(of_somebody_else) == 128 + signal.SIGTERM


TOLD_AT_LENGTH = """
import contextlib, signal, time
import click
from grokfetch import __main__, cli

@click.command()
def status():
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)
    raise ImportError("what was interrupted fails in its own way")

def failed(context, error):
    # Longer than it takes until a dropped interruption is raised again.
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        pass

cli.failed = failed
cli.main.get_command = lambda context, name: status
__main__.start()
"""


def test_one_that_is_being_told_is_not_raised_once_more():
    command = [sys.executable, "-c", TOLD_AT_LENGTH, "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == "interrupted; finished work is kept, run the command again\n"
    assert done.returncode == 130


BETWEEN_STEPS = """
import signal
import click
from grokfetch import __main__, cli

class Context(click.Context):
    def __enter__(self):
        signal.raise_signal(signal.SIGTERM)

cli.main.context_class = Context
__main__.start()
"""


def test_one_that_comes_while_click_has_the_word_has_the_same_code():
    command = [sys.executable, "-c", BETWEEN_STEPS, "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


HELD = """
import signal, threading, time
from grokfetch import interruption
interruption.install()
with interruption.Held():
    # The signal is sent to the process: if one thread blocks it, another one takes it.
    other = threading.Thread(target=lambda: signal.raise_signal(signal.SIGTERM))
    other.start()
    other.join()
    time.sleep(0.1)
    print("held", flush=True)
try:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pass
except interruption.Interrupted as error:
    print("raised", interruption.honour(error))
"""


def test_where_interruptions_are_held_they_come_afterwards():
    command = [sys.executable, "-c", HELD]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "held\nraised 143\n"


ENDED = """
import signal, sys
from grokfetch import interruption
interruption.install()
interruption.uninstall()
signal.raise_signal(signal.SIGALRM)
sys.exit(3)
"""


def test_a_timer_that_goes_off_as_the_program_ends_does_not_change_its_code():
    done = subprocess.run([sys.executable, "-c", ENDED], check=False, timeout=60)
    assert done.returncode == 3


def test_a_ctrl_c_that_the_parent_ignores_stays_ignored(tmp_path):
    script = (
        "import signal\n"
        "from grokfetch import interruption\n"
        "interruption.install()\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "print('on')\n"
    )
    ignoring = ("sh", "-c", 'trap "" INT; exec "$0" "$@"')
    command = (*ignoring, sys.executable, "-c", script)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "on\n"


def test_a_reader_who_has_read_enough_is_no_failure(folder):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "grokfetch", "inspect", str(folder / "release")]
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""
