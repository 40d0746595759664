"""Docstrings of this project as reStructuredText: sections, formulas, names in backticks.

A docstring is plain Markdown with the sections Args, Returns, Raises and Examples, and with a
paragraph "Formula:". What a class says under Returns is about calling an instance, so it becomes
the body of `__call__`, below the signature of `forward`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from formulas import latex
from sphinx.application import Sphinx

__all__ = ["setup"]

_SECTIONS = ("Args", "Returns", "Raises", "Examples", "Attributes", "Keys", "Yields", "Warns")
_HEADING = re.compile(rf"({'|'.join(_SECTIONS)}):\s*$")
_FIELD = re.compile(r"(?P<name>[\w, *]+?)(?: \((?P<type>[^)]*)\))?: (?P<text>.*)", re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")

# What a name in backticks may link to: every public name, by its full name.
_PUBLIC = (
    "c2bin_ext",
    "c2bin_ext.functional",
    "c2bin_ext.statistics",
    "c2bin_ext.distributed",
    "c2bin_ext.metrics",
    "c2bin_ext.monitoring",
    "c2bin_ext.checkpoints",
    "c2bin_ext.testing",
)


def _known() -> dict[str, str]:
    names: dict[str, str] = {}
    for module in _PUBLIC:
        for name in importlib.import_module(module).__all__:
            item = getattr(importlib.import_module(module), name)
            if not callable(item) or name.startswith("__"):
                continue
            full = f"{module}.{name}"
            short = full.removeprefix("c2bin_ext.")
            # A plain word, such as `assignments`, is more often an argument than a function.
            plain = name.islower() and "_" not in name
            for alias in (short, full) if plain else (name, short, full):
                names.setdefault(alias, full)
            if inspect.isclass(item):
                for member, value in vars(item).items():
                    if not member.startswith("_") and inspect.isroutine(value) and value.__doc__:
                        names.setdefault(f"{name}.{member}", f"{full}.{member}")
    return names


def _inline(text: str, names: dict[str, str]) -> str:
    def code(match: re.Match[str]) -> str:
        content = " ".join(match[1].split())
        if content in names:
            shown = content.removeprefix("c2bin_ext.")
            return f":py:obj:`{shown} <{names[content]}>`"
        if page := re.fullmatch(r"docs/(.+)\.md", content):
            return f":doc:`/{page[1]}`"
        return f"``{content}``"

    # A star or a bar of prose is no markup; inside code it stays as it is.
    pieces = _CODE.split(text)
    prose = [re.sub(r"([*|])(?=\S)", r"\\\1", piece) for piece in pieces[::2]]
    found = [code(match) for match in _CODE.finditer(text)]
    return "".join(a + b for a, b in zip(prose, [*found, ""], strict=True))


def _paragraphs(lines: Iterable[str]) -> list[list[str]]:
    """Runs of lines between blank ones."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [paragraph for paragraph in found if paragraph]


def _formula(text: str, names: dict[str, str]) -> Iterator[str]:
    """The paragraph "Formula:": what comes first is displayed, the rest set inline."""

    def is_formula(content: str) -> bool:
        return content not in names and not re.match(r"[a-z][a-z]\w+([.(]\w+.*)?$", content)

    def inline(part: str) -> str:
        pieces, last = [], 0
        for match in _CODE.finditer(part):
            pieces.append(_inline(part[last : match.start()], names))
            content = " ".join(match[1].split())
            math = is_formula(content)
            pieces.append(rf":math:`{latex(content)}`" if math else _inline(match[0], names))
            last = match.end()
        return "".join([*pieces, _inline(part[last:], names)])

    first = re.match(r"`([^`]+)`", text)
    if first is None or not is_formula(first[1]) or len(first[1]) < 12:
        yield from ["**Formula:** " + inline(text), ""]
        return
    yield from ["", ".. math::", "", "   " + latex(" ".join(first[1].split())), ""]
    rest = text[first.end() :].lstrip(" .,:;")
    if rest:
        yield from [inline(rest), ""]


def _table(rows: list[str], names: dict[str, str]) -> Iterator[str]:
    yield from ["", ".. list-table::", "   :header-rows: 1", ""]
    for number, row in enumerate(rows):
        if number == 1:  # the line of dashes
            continue
        for place, cell in enumerate(row.strip().strip("|").split(" | ")):
            yield ("   * - " if place == 0 else "     - ") + _inline(cell.strip(), names)
    yield ""


def _body(lines: list[str], names: dict[str, str]) -> Iterator[str]:
    for paragraph in _paragraphs(lines):
        text = "\n".join(paragraph)
        if text.startswith("Formula: "):
            yield from _formula(text.removeprefix("Formula: "), names)
        elif text.startswith("| "):
            yield from _table(paragraph, names)
        elif paragraph[0].lstrip().startswith(">>> "):
            yield from ["", *paragraph, ""]
        else:
            yield from [*_inline(text, names).splitlines(), ""]


def _items(lines: list[str]) -> Iterator[str]:
    """The entries of a section, each with the lines indented below it as one text."""
    entry: list[str] = []
    for line in lines:
        if line.strip() and not line.startswith(" ") and entry:
            yield " ".join(" ".join(entry).split())
            entry = []
        if line.strip():
            entry.append(line)
    if entry:
        yield " ".join(" ".join(entry).split())


def _section(title: str, lines: list[str], names: dict[str, str]) -> Iterator[str]:
    yield ""
    if title in ("Examples", "Yields"):
        yield from [f".. rubric:: {title}", ""]
        for paragraph in _paragraphs(lines):
            code = paragraph[0].lstrip().startswith(">>> ")
            yield from (paragraph if code else _inline("\n".join(paragraph), names).splitlines())
            yield ""
    elif title == "Returns":
        text = _inline("\n".join(lines).strip(), names).splitlines()
        yield from [f":returns: {text[0]}", *("   " + line.strip() for line in text[1:]), ""]
    else:
        roles = {"Args": "param", "Attributes": "ivar", "Keys": "ivar"}
        role = roles.get(title, "raises")
        for item in _items(lines):
            match = _FIELD.fullmatch(item)
            if match is None:
                raise ValueError(f"{title}: no `name: text` in {item!r}")
            for name in match["name"].split(", "):
                kind = f" *({match['type']})*" if match["type"] else ""
                shown = re.sub(r"\*|_$", r"\\\g<0>", name.strip())
                text = re.sub(r"^\w\.$", r"\\\g<0>", match["text"])  # no item of a list
                yield f":{role} {shown}:{kind} {_inline(text, names)}"
        yield ""


def _split(lines: list[str]) -> tuple[list[str], list[tuple[str, list[str]]], list[str]]:
    """Body, sections, and what stands behind them."""
    body: list[str] = []
    sections: list[tuple[str, list[str]]] = []
    after: list[str] = []
    target = body
    for line in lines:
        heading = _HEADING.match(line)
        if heading:
            sections.append((heading[1], []))
            target = sections[-1][1]
        elif line.strip() and not line.startswith(" ") and sections:
            target = after
            target.append(line)
        else:
            target.append(line.removeprefix("    ") if target is not body else line)
    return body, sections, after


def _process(names: dict[str, str]) -> Callable[..., None]:
    def process(
        app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]
    ) -> None:
        body, sections, after = _split(lines)
        result = list(_body(body, names))
        for title, content in sections:
            called = what == "class" and hasattr(item, "forward") and title == "Returns"
            if called:
                continue
            result += _section(title, content, names)
        result += ["", *_body(after, names)]
        for title, content in sections:
            if what == "class" and hasattr(item, "forward") and title == "Returns":
                signature = str(inspect.signature(item.forward)).replace("(self, ", "(")
                signature = signature.replace("'", "")  # annotations are strings
                text = _inline("\n".join(content).strip(), names)
                result += ["", f".. py:method:: __call__{signature}", ""]
                result += ["   " + line for line in text.splitlines()]
                result.append("")
        lines[:] = result

    return process


def _skip(app: Sphinx, what: str, name: str, item: Any, skip: bool, options: Any) -> bool | None:
    # The fields of a named tuple are described in its docstring, `forward` under `__call__`. The
    # others are what a host asks for or adds: torch, the benchmarks, scikit-learn.
    hidden = re.fullmatch(r"forward|extra_repr|form|set_\w+_request", name)
    return True if type(item).__name__ == "_tuplegetter" or hidden else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to autodoc.

    Args:
        app: the Sphinx application.

    Returns:
        What Sphinx asks of an extension.
    """
    app.connect("autodoc-process-docstring", _process(_known()))
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
