"""What the documents name exists."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
from support.demo import fetch_demo

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ARCHITECTURE.md"


def defined(path):
    """The functions, classes and methods of a module, methods as Class.method."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{it.name}" for it in node.body if hasattr(it, "name"))
        elif isinstance(node, ast.FunctionDef):
            yield node.name


def unknown(text):
    """The names between backticks, `file.py` or `file.py::name`, that do not exist."""
    for file, name in re.findall(r"`([\w/.-]+\.py)(?:::([\w.]+))?`", text):
        path = ROOT / file
        if not path.is_file() or (name and name not in defined(path)):
            yield f"{file}::{name}"


def test_architecture_names_what_exists():
    text = PAGE.read_text()
    assert len(re.findall(r"`[\w/.-]+\.py::[\w.]+`", text)) > 50
    assert not list(unknown(text))


@pytest.mark.parametrize(
    "name",
    [
        "loader/gone.py",
        "loader/inference/model.py::gone",
        "loader/inference/engine.py::Engine.gone",
    ],
)
def test_name_that_is_gone_is_found(name):
    assert len(list(unknown(f"see `loader/inference/model.py::embed` and `{name}`"))) == 1


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(str(it.relative_to(ROOT)) for it in ROOT.glob("docs/**/*.md")),
    ],
)
def test_links_between_documents_lead_somewhere(document):
    path = ROOT / document
    targets = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


def messages():
    """Every string in the program, with dots for inserted values."""
    for path in [*ROOT.glob("grokfetch/**/*.py"), *ROOT.glob("loader/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            yield "".join(str(it.value) if isinstance(it, ast.Constant) else "..." for it in parts)


def test_the_messages_that_the_documents_explain_are_the_programs():
    told = "\n".join(messages())
    page = ROOT.joinpath("docs/troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall("`(.*?)`", cell)]
    assert len(quoted) >= 10
    for text in quoted:
        assert re.search(".*".join(map(re.escape, text.split("..."))), told), text


def test_the_page_of_commands_is_what_the_program_prints():
    script = runpy.run_path(str(ROOT / "docs/reference/generate.py"))
    assert script["PAGE"].read_text() == script["page"](), "run: python docs/reference/generate.py"


def test_the_readmes_python_prints_what_the_readme_says(tmp_path, capsys):
    readme = ROOT.joinpath("README.md").read_text()
    example, printed = re.search(
        r"```python\n(.*?)```\n\n```\n(.*?)```", readme, re.DOTALL
    ).groups()
    assert "try/fetched" in example
    exec(example.replace("try/fetched", str(fetch_demo(tmp_path))))
    assert capsys.readouterr().out == printed


def test_the_readme_is_a_front_door():
    assert len(ROOT.joinpath("README.md").read_text().splitlines()) <= 150
