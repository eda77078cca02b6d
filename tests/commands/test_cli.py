"""The program as its users meet it: help, imports, errors and their exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.program import HEAVY, grokfetch, imported_by, invoke

from grokfetch import cli, errors

ROOT = Path(__file__).parents[2]


def help_of(*arguments: str) -> str:
    """Code that prints the help of a command and continues."""
    call = f"main({[*arguments, '--help']})"
    return f"from grokfetch.cli import main\ntry: {call}\nexcept SystemExit: pass"


def test_help_imports_nothing_heavy_and_no_command():
    assert not imported_by(help_of()) & HEAVY
    probe = "assert not [name for name in sys.modules if name.startswith('grokfetch.commands.')]"
    subprocess.run([sys.executable, "-c", f"import sys\n{help_of()}\n{probe}"], check=True)


def test_every_command_explains_itself_without_importing_anything_heavy():
    if imported_by("\n".join(map(help_of, cli.COMMANDS))) & HEAVY:
        assert not [it for it in cli.COMMANDS if imported_by(help_of(it)) & HEAVY]
        pytest.fail("a command imports something heavy after another one's help")


def test_fetching_needs_neither_jax_nor_numpy():
    code = "import grokfetch.commands.fetch, grokfetch.fetch, grokfetch.fetch.swarm, libtorrent"
    assert not imported_by(code) & (HEAVY - {"libtorrent"})


def test_python_m_grokfetch_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "grokfetch", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: grokfetch ")
    assert all(f"  {command} " in done.stdout for command in cli.COMMANDS)


def test_an_unknown_command_is_a_usage_error():
    grokfetch("fly", code=2)


def test_every_error_has_its_own_exit_code_and_the_readme_lists_it():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code: kind for kind in kinds if issubclass(kind, errors.GrokfetchError)}
    assert len(codes) == len([kind for kind in kinds if issubclass(kind, errors.GrokfetchError)])
    table = dict(
        re.findall(
            r"^\| (\d+) \| `(\w+)`",
            (ROOT / "docs/reference/exit-codes.md").read_text(),
            re.MULTILINE,
        )
    )
    del codes[1]
    assert {int(code): name for code, name in table.items()} == {
        code: kind.__name__ for code, kind in codes.items()
    }


def test_an_error_says_what_where_and_what_to_do_next():
    error = errors.NotProven("2 pieces are not proven", path="a/b", hint="run: grokfetch verify a")
    assert str(error) == "a/b: 2 pieces are not proven\n  run: grokfetch verify a"


@pytest.mark.parametrize("redirection", [">&-", "2>&-"])
def test_a_stream_that_is_closed_ends_nothing(tmp_path, redirection):
    done = subprocess.run(
        f"'{sys.executable}' -m grokfetch plan --to '{tmp_path}' --plain {redirection}",
        shell=True,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode in (0, errors.StorageFailed.exit_code)
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_told(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "grokfetch", "plan", "--to", tmp_path, "--json"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert done.returncode == errors.StorageFailed.exit_code
    assert done.stderr.splitlines()[0] == "error: stdout: the disk is full"


def test_a_file_in_the_place_of_a_folder_is_told_with_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    torrent = ROOT / "demo/published/grok-demo.torrent"
    arguments = ["fetch", torrent, "--to", tmp_path / "file/below", "--no-discovery"]
    result = invoke(*arguments, code=errors.StorageFailed.exit_code)
    assert "is a file where a folder is needed" in result.stderr
    assert "choose another folder" in result.stderr


def test_an_empty_source_is_not_the_folder_at_hand():
    result = invoke("fetch", "", code=errors.SourceInvalid.exit_code)
    assert "SOURCE is empty" in result.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_ends_with_two_examples_of_the_command(command):
    text = invoke(command, "--help").stdout
    *_, title, first, second = text.splitlines()
    assert title == "Examples:"
    assert all(line.startswith(f"  grokfetch {command}") for line in (first, second))


@pytest.mark.parametrize("command", ["fetch", "run"])
def test_help_with_many_options_groups_each_of_them_once(command):
    text = invoke(command, "--help").stdout
    context = cli.main.make_context("grokfetch", [], resilient_parsing=True)
    found = cli.main.get_command(context, command)
    names = {name for names in found.groups.values() for name in names}
    assert names == {option.name for option in found.params if option.param_type_name == "option"}
    assert all(f"\n{title}:\n" in text for title in found.groups)


def test_a_mistyped_command_is_told_the_nearest():
    assert "Did you mean 'fetch'?" in invoke("fecth", code=2).stderr


def test_a_prompt_without_quotes_is_told_to_be_quoted():
    assert "put the prompt in quotes" in invoke("run", "x", "hello", "world", code=2).stderr
