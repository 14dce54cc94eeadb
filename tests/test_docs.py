"""The documentation matches the code: commands, options, tables, settings, links and examples."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import saqcli
from saqcli import config
from saqcli.cli import app

ROOT = Path(__file__).resolve().parents[1]
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted({*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")})
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # a changelog may name removed options

SETUP = ("pip install . && saq demo", 'pip install ".[test]" && pytest')
TABLES = {
    "QUANTIZERS": "quant/quantizers",
    "MINIMIZERS": "training/minimizers",
    "SEARCHERS": "searchers",
    "STYLES": "export",
    "INSTRUMENTS": "analysis",
    "TRACKERS": "runs/trackers",
}

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")
UNIVERSAL = {"--help", "-h"}

GROUP: Any = get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands


def options_of(command: Any) -> set[str]:
    """Every spelling of every option except ``--help``."""
    names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return {name for name in names if name.startswith("-")} - UNIVERSAL


def title(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def code_spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in CODE_SPAN.findall(FENCE.sub("", text))]


def command_lines(text: str) -> list[str]:
    """Every call of ``saq`` in a shell block, without comments and chained commands."""
    lines = []
    for language, body in FENCE.findall(text):
        if language not in ("sh", "bash", "shell", "console", ""):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue  # what a command printed
            for part in re.split(r"&&|\|\||;|\|", line.removeprefix("$ ")):
                if part.strip().startswith("saq "):
                    lines.append(part.strip())
    return lines


def entries_of(table: str) -> list[str]:
    """The keys of a table, read from its source, since importing the exporters takes seconds."""
    source = ast.parse(text_of(ROOT / "saqcli" / TABLES[table] / "__init__.py"))
    for node in source.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) not in ("_OURS", table):
                continue
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError(f"{table} is not where it was")


def slug(heading: str) -> str:
    """GitHub's anchor for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def script(name: str) -> Any:
    """``docs/NAME.py``, imported from its file."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_cli() -> Any:
    return script("make_cli")


class TestCommandReference:
    def test_generated_page_is_current(self, make_cli: Any) -> None:
        assert text_of(DOCS / "cli.md") == make_cli.reference(), "run python docs/make_cli.py"

    def test_output_is_independent_of_the_terminal(
        self, make_cli: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = make_cli.reference()
        for name, value in {"COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": "1"}.items():
            monkeypatch.setenv(name, value)
        assert make_cli.reference() == before

    def test_lists_every_command(self) -> None:
        assert set(re.findall(r"^## saq (\S+)$", text_of(DOCS / "cli.md"), re.MULTILINE)) == set(COMMANDS)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_lists_exactly_all_options(self, name: str) -> None:
        section = text_of(DOCS / "cli.md").split(f"## saq {name}\n")[1].split("\n## ")[0]
        cells = re.findall(r"^\| (`-.*?) \| ", section, re.MULTILINE)
        found = {span.split()[0] for cell in cells for span in CODE_SPAN.findall(cell)}
        assert found == options_of(COMMANDS[name])


class TestTablesAndSettings:
    @pytest.mark.parametrize("table", TABLES)
    def test_every_table_entry_is_documented(self, table: str) -> None:
        pages = text_of(DOCS / "cli.md") + text_of(DOCS / "architecture.md")
        entries = entries_of(table)
        assert entries
        assert not [name for name in entries if f"`{name}`" not in pages]

    def test_every_recipe_is_documented(self) -> None:
        pages = text_of(DOCS / "cli.md") + text_of(DOCS / "architecture.md")
        assert not [name for name in config.recipes() if f"`{name}`" not in pages]

    def test_every_setting_and_default_is_documented(self) -> None:
        settings = config.RunConfig(model=config.ModelSection(name="any")).model_dump()
        settings = json.loads(json.dumps(settings))  # JSON of saq leaves some unused settings out
        expected = {}
        for section, values in settings.items():
            for key, value in values.items() if isinstance(values, dict) else [("", values)]:
                expected[f"{section}.{key}".rstrip(".")] = value
        del expected["model.name"]  # has no default

        rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", text_of(DOCS / "formats.md"), re.MULTILINE)

        assert {key: json.loads(default) for key, default in rows} == expected

    def test_walkthroughs_name_existing_functions(self) -> None:
        rows = re.findall(
            r"^\| [^|]+ \| `([\w/]+\.py)` \| `(\w+)` \|$", text_of(DOCS / "architecture.md"), re.MULTILINE
        )
        assert len(rows) > 10
        for file, name in rows:
            tree = ast.parse((ROOT / "saqcli" / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, DEFINITIONS)}, (
                f"{file} {name}"
            )

    def test_python_reference_matches_docstrings(self) -> None:
        assert text_of(DOCS / "python.md") == script("make_python").page(), "run python docs/make_python.py"

    def test_file_tree_matches_docstrings(self) -> None:
        make_tree = script("make_tree")
        assert text_of(DOCS / "architecture.md") == make_tree.page(), "run python docs/make_tree.py"
        assert f"{make_tree.PACKAGE.name}/" in make_tree.page()


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(target)), re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_data_blocks_parse(page: Path) -> None:
    for body in blocks(text_of(page), "json"):
        json.loads(body)
    for body in blocks(text_of(page), "toml"):
        tomllib.loads(body)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_python_blocks_compile_and_import(page: Path) -> None:
    for body in blocks(text_of(page), "python"):
        tree = ast.parse(body, str(page))
        compile(tree, str(page), "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saqcli":
                names = {alias.name for alias in node.names}
                if node.module == "saqcli":
                    assert names <= set(saqcli.__all__), ast.unparse(node)
                else:
                    assert names <= set(dir(importlib.import_module(node.module or ""))), ast.unparse(node)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "saqcli":
                assert node.attr in saqcli.__all__, ast.unparse(node)


@pytest.mark.parametrize("page", GUIDES, ids=title)
def test_command_lines_parse(page: Path) -> None:
    wrong = []
    for line in command_lines(text_of(page)):
        _, *words = shlex.split(line, comments=True)
        if not words or words[0] == "--version" or UNIVERSAL & set(words):
            continue
        if words[0] not in COMMANDS:
            wrong.append(f"{line}: no such command")
            continue
        try:
            COMMANDS[words[0]].make_context(words[0], words[1:])
        except Exception as error:  # Typer's usage errors have no public class of their own
            wrong.append(f"{line}: {error}")
    assert not wrong


@pytest.mark.parametrize("page", GUIDES, ids=title)
def test_mentioned_commands_and_options_exist(page: Path) -> None:
    every = set().union(*map(options_of, COMMANDS.values())) | options_of(GROUP) | UNIVERSAL
    wrong = []
    for span in code_spans(text_of(page)):
        if match := re.match(r"saq ([\w-]+)", span):
            if match[1] in COMMANDS:
                known = options_of(COMMANDS[match[1]]) | UNIVERSAL
            else:
                known = options_of(GROUP) | UNIVERSAL
                if not match[1].startswith("-"):
                    wrong.append(span)
        elif span.startswith("--"):
            known = every
        else:
            continue
        wrong += [f"{span}: {name}" for name in OPTION.findall(span) if name not in known]
    assert not wrong


def test_readme_names_the_setup_commands() -> None:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    lines = [line.strip() for line in text_of(README).splitlines()]
    assert [command for command in SETUP if command not in lines] == []


class TestPageParsing:
    def test_finds_calls_in_shell_blocks(self) -> None:
        text = "```sh\npip install . && saq demo\n$ saq eval x \\\n  --data d  # why\n```\n`saq models`\n"
        assert command_lines(text) == ["saq demo", "saq eval x    --data d  # why"]

    def test_finds_options_in_code_spans(self) -> None:
        assert OPTION.findall("saq eval x -q --bad-images skip a-b 1--2") == ["-q", "--bad-images"]

    def test_finds_the_options_of_a_command(self) -> None:
        assert {"--bops", "--budget", "--no-pretrained", "--set"} <= options_of(COMMANDS["quantize"])

    def test_anchors_match_github(self) -> None:
        assert slug("What `--json` prints") == "what---json-prints"
