"""Formulas of docstrings, which are plain text with Greek letters, as LaTeX."""

from __future__ import annotations

import re

__all__ = ["latex"]

_OPERATORS = ("softmax", "argmax", "mean", "max", "log", "exp", "cos", "sg")
_SYMBOLS = {
    "Σ": r"\sum ",
    "τ": r"\tau ",
    "λ": r"\lambda ",
    "θ": r"\theta ",
    "φ": r"\phi ",
    "γ": r"\gamma ",
    "∈": r"\in ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "‖": r"\|",
    "−": "-",
    "±": r"\pm ",
    "≥": r"\ge ",
    "≤": r"\le ",
    "½": r"\tfrac12 ",
    "…": r"\dots ",
    "ᵀ": r"^\top ",
    "²": "^2",
    ">=": r"\ge ",
    "<=": r"\le ",
    "...": r"\dots ",
    "''": r"''",
    "'": "'",
    "{": r"\{",
    "}": r"\}",
    "|": r"\vert ",
    "&": r"\&",
    "%": r"\%",
    "←": r"\leftarrow ",
}
_TOKEN = re.compile(
    r"(?P<sub>_(?:\{[^}]*\}|[A-Za-z0-9∈ŝ]+))"
    r"|(?P<word>[A-Za-zŝŷ]\u0302?(?:[A-Za-z]*))"
    r"|(?P<symbol>>=|<=|\.\.\.|''|[^\s\w])"
    r"|(?P<other>\s+|\w)"
)


def latex(formula: str) -> str:
    """Translate a formula: `_x` is a subscript, words are operators or upright names.

    Args:
        formula: such as `L_bca = mean_k -log( exp(S_kk) / Σ_j exp(S_kj) )`.

    Returns:
        Its LaTeX, without delimiters.
    """
    parts = []
    for match in _TOKEN.finditer(formula):
        text = match[0]
        if match["sub"]:
            inner = text[1:].strip("{}")
            upright = inner.isalpha() and len(inner) > 2
            parts.append(rf"_{{\mathrm{{{inner}}}}}" if upright else f"_{{{latex(inner)}}}")
        elif match["word"]:
            parts.append(_word(text))
        else:
            parts.append(_SYMBOLS.get(text, text))
    return "".join(parts).strip()


def _word(text: str) -> str:
    if text in _OPERATORS:
        return rf"\operatorname{{{text}}}"
    if text in ("ŝ", "ŷ"):
        return rf"\hat {'s' if text == 'ŝ' else 'y'}"
    return text if len(text) <= 2 else rf"\mathrm{{{text}}}"
