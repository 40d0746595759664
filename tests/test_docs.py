"""README and site: their code runs, their commands exist, their numbers are the measured ones.

A comment before a block of code says what the block needs: `<!-- test: setup`, then code, or
`<!-- test: skip, reason -->`. Cells of tutorials run when the site is built.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import c2bin_ext

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(c2bin_ext.__file__).parent.parent
SITE = sorted(
    page
    for page in (ROOT / "docs").rglob("*.md")
    if page.relative_to(ROOT / "docs").parts[0] != "results"
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

_PARTS = re.compile(
    r"^<!-- test: (?P<note>.*?)-->$"
    r"|^(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    language: str
    code: str
    skipped: str  # why it is not run
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of code of a page; code that only the test needs is one too, "setup"."""
    text, skipped = page.read_text(encoding="utf-8"), ""
    for match in _PARTS.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        note = match["note"]
        if note is None:
            yield Block(match["language"].strip(), match["code"], skipped, line)
            skipped = ""
        elif note.startswith("setup\n"):
            yield Block("setup", note.removeprefix("setup\n"), "", line + 1)
        else:
            found = re.fullmatch(r"skip, (\S.*\S)\s*", note, re.DOTALL)
            assert found, f"{page}:{line}: expected `setup` or `skip, reason`, got {note!r}"
            skipped = found[1]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


WITH_CODE = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_code(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks(page):
            if block.language in ("setup", "python") and not block.skipped:
                # Line numbers of an error are then those of the page.
                code = "\n" * block.line + block.code
                exec(compile(code, str(page), "exec"), namespace)
    finally:
        mock.patch.stopall()


def test_the_tutorial_trains_as_the_example_does() -> None:
    def statements(nodes: list[Any]) -> Iterator[str]:
        for node in nodes:
            yield from statements(node.body) if hasattr(node, "body") else [ast.unparse(node)]

    def training(code: str) -> tuple[dict[str, list[str]], list[str]]:
        body = ast.parse(code).body
        functions = [node for node in body if isinstance(node, ast.FunctionDef)]
        lines = [line for line in statements(body) if line != "history = []"]
        first = next(i for i, line in enumerate(lines) if line.startswith("backbone = "))
        last = lines.index("average.update_parameters(runner)")
        return {f.name: [*statements(f.body)] for f in functions}, lines[first:last]

    cells = blocks(ROOT / "docs" / "tutorials" / "own-loop.md")
    tutorial = "".join(cell.code for cell in cells if cell.language.startswith("{code-cell}"))
    example = (ROOT / "examples" / "plain_pytorch.py").read_text(encoding="utf-8")
    assert training(tutorial) == training(example)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_block_has_a_known_language(page: Path) -> None:
    known = {"python", "setup", "sh", "", "text"}
    known |= {f"{{{name}}}" for name in ("toctree", "include", "eval-rst", "code-cell")}
    for block in blocks(page):
        assert block.language.split(" ")[0] in known, f"{page}:{block.line}: {block.language!r}"


# --- commands -------------------------------------------------------------------------------------

# Programs of others and steps of a shell: what stands here is not checked.
OTHERS = re.compile(r"(git|cd|twine|python -m venv|python five_minutes\.py|trainer\.fit)\b|\. ")


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language in ("sh", ""):
            for line in block.code.replace("\\\n", " ").splitlines():
                for command in re.sub(r"\s#.*", "", line).split(" && "):
                    if command.strip():
                        yield command.strip().removeprefix("$ ")


def found(pattern: str) -> list[tuple[str, str]]:
    """Pages and their commands that begin so."""
    return [
        (name, command)
        for page, name in zip(PAGES, names(PAGES), strict=True)
        for command in commands(page)
        if re.match(pattern, command)
    ]


SCRIPT = r"python (examples|tests)/\S+"
KINDS = [
    SCRIPT,
    r"pip install",
    r"make ",
    r"c2bin-explore",
    r"python -m c2bin_(ext|lightly|solo)",
    r"python main_\w+\.py",
    r"(\.venv/bin/)?python -m pytest",
    OTHERS.pattern,
]


def test_every_command_is_of_a_kind_that_is_checked() -> None:
    for name, command in found(""):
        assert any(re.match(kind, command) for kind in KINDS), (name, command)


def test_extras_and_targets_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for name, command in found("pip install"):
        for extra in re.findall(r"c2bin-ext\[([\w,]+)\]", command):
            assert set(extra.split(",")) <= set(extras), (name, command)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, name in zip(PAGES, names(PAGES), strict=True):
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (name, target)


SCRIPTS = sorted({command.split()[1] for _, command in found(SCRIPT)})
# All in one process: each by itself would import torch and its host anew.
HELP = """
import contextlib, io, json, pathlib, runpy, sys
told = {}
for script in sys.argv[1:]:
    sys.argv, shown = [script, "--help"], io.StringIO()
    sys.path.insert(0, str(pathlib.Path(script).parent))
    with contextlib.redirect_stdout(shown):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (script, end.code)
    told[script] = shown.getvalue()
    del sys.path[0]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """What `--help` says of each script with options on a page."""
    called = {command.split()[1] for _, command in found(SCRIPT) if " --" in command}
    done = subprocess.run(
        [sys.executable, "-c", HELP, *sorted(called)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found_options: dict[str, str] = json.loads(done.stdout)
    return found_options


def check_options(where: str, command: str, known: str) -> None:
    for option in re.findall(r"(?<!\S)--[a-z][\w-]*", command):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), f"{where}: no {option}: {command}"


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_have_the_options_that_pages_name(path: str, told: dict[str, str]) -> None:
    assert (ROOT / path).exists()
    for name, command in found(SCRIPT):
        if command.split()[1] == path and " --" in command:
            check_options(name, command, told[path])


def test_explore_has_the_options_that_pages_name() -> None:
    module, function = PROJECT["project"]["scripts"]["c2bin-explore"].split(":")
    told = {}
    for sub in ([], ["apply"]):
        known = io.StringIO()
        with contextlib.redirect_stdout(known), pytest.raises(SystemExit):
            getattr(importlib.import_module(module), function)([*sub, "--help"])
        told[bool(sub)] = known.getvalue()
    for name, command in found("c2bin-explore"):
        check_options(name, command, told[command.startswith("c2bin-explore apply")])


def test_configs_exist() -> None:
    for name, command in found(r"python main_\w+\.py"):
        words = shlex.split(command)
        config = words[words.index("--config-name") + 1]
        path = ROOT / "integrations" / "c2bin_solo" / "configs" / f"{config}.yaml"
        assert path.exists(), (name, config)


# --- numbers --------------------------------------------------------------------------------------

# Rows of docs/explanation/defaults.md, and the variant of docs/results/decisions*.json of each.
ROWS = {
    "contrast with": "against the runner",
    "`normalize`": "features as they are",
    "`temperature`": "temperature 0.5",
    "`cluster_weight`": "cluster weight 2",
    "`entropy_weight`": "no entropy",
    "`similarity`": "dot",
    "`positive_in_denominator`": "positive left out",
    "`symmetric`": "one direction",
    "`symmetric_alignment`": "alignment in one direction",
    "`reduction` of the entropy": "entropy summed",
    "all weights and wiring as in the paper": "the paper's weights",
    "all formulas as printed": "as printed",
}


def knn(file: str) -> dict[str, float]:
    """Mean kNN accuracy (k = 200) by variant, as its table has it."""
    table = (ROOT / "docs" / "results" / f"{file}.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    column = rows[0].index("kNN k=200")
    return {row[0]: float(row[column].split(" ± ")[0]) for row in rows[2:] if len(row) > column}


def test_what_a_choice_costs() -> None:
    page = (ROOT / "docs" / "explanation" / "defaults.md").read_text(encoding="utf-8")
    digits, photographs = knn("decisions"), knn("decisions_cifar10")
    for choice, variant in ROWS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {choice} |"))
        said = re.search(r"(−?[\d.]+) / (−?[\d.]+) \|$", row)
        assert said, row
        for number, scores in zip(said.groups(), (digits, photographs), strict=True):
            cost = scores["default"] - scores[variant]
            assert float(number.replace("−", "-")) == pytest.approx(cost, abs=0.051), row
    behind = re.search(r"without clusters, is ([\d.]+) / ([\d.]+) points behind", page)
    assert behind
    for number, scores in zip(behind.groups(), (digits, photographs), strict=True):
        cost = scores["default"] - scores["BYOL, no cluster terms"]
        assert float(number) == pytest.approx(cost, abs=0.051)


def test_results_have_their_settings() -> None:
    for table in sorted((ROOT / "docs" / "results").rglob("*.md")):
        assert json.loads(table.with_suffix(".json").read_text(encoding="utf-8")), table


# --- site and package index -----------------------------------------------------------------------


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    """And nothing else does: the site itself is built without a warning by `make docs`."""
    pytest.importorskip("sphinx")
    source = tmp_path / "source"
    source.mkdir()
    links = "[link](other.md) [broken](no-such-page.md)"
    (source / "index.md").write_text(f"# Title\n\n{links}\n\n```{{toctree}}\nother\n```\n")
    (source / "other.md").write_text("# Other\n\nText.\n")
    recipe = re.search(r"-m sphinx (.*) docs site", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert recipe
    command = [sys.executable, "-m", "sphinx", *recipe[1].split(), "-c", str(ROOT / "docs")]
    done = subprocess.run(
        [*command, str(source), str(tmp_path / "site")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert re.findall("WARNING: .*", done.stderr) == [mock.ANY], done.stderr
    assert "no-such-page" in done.stderr


def test_readme_on_the_package_index_has_no_relative_link() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = re.compile(r"\]\((?!https?://|#)")
    assert relative.search(text)
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not relative.search(text)
    assert "[solo-learn itself]" not in text
    assert "solo-learn itself" in text


def test_readme_leads_to_files_that_exist() -> None:
    for page in PAGES[:2]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), (page, target)
