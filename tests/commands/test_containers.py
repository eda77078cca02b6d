"""Containers and batch jobs: no home, no passwd entry, little room, the program is process 1."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.demo import fetch_demo
from support.program import invoke
from support.small_disk import small_disk

from grokfetch.cache_folder import cache_folder
from grokfetch.errors import OutOfReach, StorageFailed

DEADLINE_S = 60
LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery")
ALONE = ("--mesh", "model=1", "--dtype", "float32")
PROMPT = "Until then, have"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fetch_demo(tmp_path_factory.mktemp("demo") / "grok")


# --- the folder for what can be made again -------------------------------------------------------


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """Unset all variables for the user's files; the current and the temporary folder are inside."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    (tmp_path / "here").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


def unknown_user(_number):
    raise KeyError("uid not found")


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_a_user_without_a_home_keeps_nothing_in_the_current_folder(homeless, monkeypatch, home):
    if home is None:
        monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    else:
        monkeypatch.setenv("HOME", home)
    folder = cache_folder()
    assert folder == homeless / f"tmp/grokfetch-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not any((homeless / "here").iterdir())


def test_a_folder_that_another_user_made_first_is_not_used(homeless, monkeypatch):
    monkeypatch.setenv("HOME", "")
    (homeless / "elsewhere").mkdir()
    (homeless / f"tmp/grokfetch-{os.getuid()}").symlink_to(homeless / "elsewhere")
    assert not cache_folder().exists()


def test_a_home_that_is_known_is_used(homeless, monkeypatch):
    monkeypatch.setenv("HOME", str(homeless))
    assert homeless in cache_folder().parents


def no_temporary_folder():
    raise FileNotFoundError(2, "No usable temporary directory found")


def test_without_a_temporary_folder_nothing_is_kept_and_demo_says_what_it_needs(
    homeless, monkeypatch
):
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._get_default_tempdir", no_temporary_folder)
    assert not cache_folder().exists()
    said = invoke("demo", code=StorageFailed.exit_code).output
    assert "cannot create temporary files" in said
    assert "TMPDIR=" in said


@pytest.mark.slow
def test_a_full_cache_costs_compiling_anew_and_no_warning(tmp_path, demo):
    with small_disk(tmp_path / "cache", "size=16k") as full:
        environment = os.environ | {"XDG_CACHE_HOME": str(full)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, "-m", "grokfetch", "run", demo, PROMPT, "--max-tokens", "2"]
        done = subprocess.run(
            [*command, *ALONE], env=environment, capture_output=True, text=True, check=True
        )
    assert done.stdout == " pati\n"[: len(done.stdout) - 1] + "\n"
    assert "Warning" not in done.stderr


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_too_little_address_space_for_a_model_is_refused_by_name(demo):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1600 << 20, 1600 << 20))"
    arguments = ["run", str(demo), PROMPT, "--max-tokens", "1", *ALONE]
    code = f"{limit}\nfrom grokfetch.cli import main\nmain({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == OutOfReach.exit_code, done.stderr
    assert "ulimit -v allows" in done.stderr
    assert "ulimit -v unlimited" in done.stderr


# --- process 1 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unshare():
    """The tool that runs a program with its own process ids, if that is permitted."""
    tool = shutil.which("unshare")
    command = [tool or "unshare", "--pid", "--fork"]
    if (
        tool is None
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("making a namespace of process numbers takes Linux and the right to")
    return command


def ended_as_process_1(unshare, until, *arguments):
    """The exit code and stderr of the program that got SIGTERM after a line with `until`."""
    command = [*unshare, sys.executable, "-m", "grokfetch", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as outside:
        lines = []
        try:
            while not lines or until not in lines[-1]:
                lines.append(outside.stdout.readline())
                assert lines[-1], "".join(lines)
            (program,) = psutil.Process(outside.pid).children()
            numbers = Path(f"/proc/{program.pid}/status").read_text()
            assert re.search(r"^NSpid:.*\t1$", numbers, re.MULTILINE)
            program.send_signal(signal.SIGTERM)
            rest, _ = outside.communicate(timeout=DEADLINE_S)
        finally:
            outside.kill()
    return outside.returncode, "".join(lines) + rest


def test_sigterm_ends_a_fetch_that_is_process_1(unshare, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = "{}:{}".format(*silent.getsockname())
        code, said = ended_as_process_1(
            unshare, '"', "fetch", "a" * 40, "--to", tmp_path / "out",
            "--peer", peer, *LOOPBACK, "--no-mirrors", "--json",
        )  # fmt: skip
    assert code == 128 + signal.SIGTERM, said
    assert "Traceback" not in said


def test_sigterm_ends_a_seed_that_is_process_1(unshare, demo):
    code, said = ended_as_process_1(unshare, "shar", "seed", demo, *LOOPBACK)
    assert code == 0, said
    assert "Traceback" not in said


def test_sigterm_ends_a_run_that_is_process_1(unshare, demo):
    arguments = ("run", demo, PROMPT, "--max-tokens", 1000, *ALONE)
    code, said = ended_as_process_1(unshare, "mapped", *arguments)
    assert code == 128 + signal.SIGTERM, said
    assert "interrupted" in said
    assert "Traceback" not in said
