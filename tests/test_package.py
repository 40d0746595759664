"""What importing the package brings in, what it exports, and what its docstrings say."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import c2bin_ext
from c2bin_ext import __main__, functional

PUBLIC = {
    "BCAContrastiveLoss",
    "BootstrapAlignmentLoss",
    "ClusterEntropyRegularizer",
    "MultiScaleClusterHead",
    "C2BINLoss",
    "C2BINLossOutput",
    "C2BINObjective",
    "ClusterLossOutput",
    "MultiScaleClusterLoss",
    "functional",
    "__version__",
}
EQUATIONS = {
    "bootstrap_alignment_loss": "1",
    "cluster_assignments": "2",
    "bca_contrastive_loss": "4",
    "cluster_mass": "5",
    "cluster_entropy_regularizer": "5",
    "multi_scale_cluster_loss": "6",
    "c2bin_loss": "7",
    "c2bin_statistics": "1",
}
CLASSES = {
    "BCAContrastiveLoss": "4",
    "BootstrapAlignmentLoss": "1",
    "ClusterEntropyRegularizer": "5",
    "MultiScaleClusterHead": "6",
    "MultiScaleClusterLoss": "6",
    "C2BINLoss": "7",
    "C2BINObjective": "7",
}
OUTPUTS = ("C2BINLossOutput", "ClusterLossOutput")
ROOT = Path(c2bin_ext.__file__).parent.parent
PROGRAMS = Path(__file__).parent / "programs"


def fresh(program: str, *options: str) -> str:
    """What a program prints in an interpreter that has imported nothing of ours."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *options, str(PROGRAMS / program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_needs_torch_only() -> None:
    assert fresh("imported_modules.py", "-W", "error").split() == ["c2bin_ext"]


def test_import_leaves_global_state_alone() -> None:
    assert fresh("global_state.py").strip() == "True"


def test_all() -> None:
    assert set(c2bin_ext.__all__) == PUBLIC
    assert len(c2bin_ext.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(c2bin_ext, name) is not None


def test_functional_all() -> None:
    assert set(EQUATIONS) <= set(functional.__all__)
    for name in functional.__all__:
        assert getattr(functional, name) is not None


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?([.+-]?\w+)*", c2bin_ext.__version__)


def test_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == c2bin_ext.__version__


def test_main_prints_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"torch": "2.9.9", "scipy": "1.2.3"}

    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(__main__, "version", version)
    __main__.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"c2bin-ext {c2bin_ext.__version__}, Python ")
    assert "torch 2.9.9\n" in printed
    assert "[eval] scikit-learn is not installed, scipy 1.2.3\n" in printed


def test_main_names_the_extras_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(__main__._EXTRAS) == set(extras) - {"docs", "dev"}
    # solo-learn comes without pip's help, pytorch-lightning with lightly.
    elsewhere = {"solo-learn", "pytorch-lightning"}
    for extra, packages in __main__._EXTRAS.items():
        wanted = " ".join(extras[extra])
        assert all(package in wanted for package in set(packages) - elsewhere), extra


def test_star_import() -> None:
    namespace: dict[str, Any] = {}
    exec("from c2bin_ext import *", namespace)
    assert set(namespace) >= PUBLIC


def test_typed() -> None:
    assert (Path(c2bin_ext.__file__).parent / "py.typed").exists()


def test_classes_live_where_pickle_and_docs_can_find_them() -> None:
    for name in [*CLASSES, *OUTPUTS]:
        item = getattr(c2bin_ext, name)
        assert item.__name__ == name
        assert item.__module__.split(".")[0] == "c2bin_ext"


def cited(text: str) -> set[int]:
    """The numbers of the equations a text cites: "Eq. 4", "Eqs. 2, 3 and 6", "Eq. 5-7"."""
    numbers: set[int] = set()
    for match in re.finditer(r"\b(?:Eqs?\.|Equations?)\s*\(?((?:\d|\W|and|to)+)", text):
        for first, last in re.findall(r"(\d)\)?(?:\s*(?:-|\u2013|to)+\s*\(?(\d))?", match[1]):
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def test_cited() -> None:
    assert cited("as in Eq. 4 of the paper") == {4}
    assert cited("Eqs. 2, 3 and 6") == {2, 3, 6}
    assert cited("(Eq. 5-7), 2020") >= {5, 6, 7}
    assert cited("no equation 4") == set()


def check_docstring(text: str, equation: str) -> None:
    assert re.match(r"\S.*\.\n\n", text), "one-line summary, then a blank line"
    for part in ("Args:", "Returns:", "Raises:", ">>> "):
        assert part in text
    assert int(equation) in cited(text)
    assert "Examples" in text or "Example" in text


@pytest.mark.parametrize(("name", "equation"), EQUATIONS.items())
def test_function_docstrings(name: str, equation: str) -> None:
    function = getattr(functional, name)
    text = inspect.getdoc(function) or ""
    check_docstring(text, equation)
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^\s*(\w+, )*{parameter}(, \w+)*:", text, re.MULTILINE), parameter


@pytest.mark.parametrize(("name", "equation"), CLASSES.items(), ids=CLASSES)
def test_class_docstrings(name: str, equation: str) -> None:
    item = getattr(c2bin_ext, name)
    text = inspect.getdoc(item) or ""
    check_docstring(text, equation)
    for parameter in inspect.signature(item).parameters:
        assert re.search(rf"^\s*(\w+, )*{parameter}(, \w+)*:", text, re.MULTILINE), parameter
    for parameter in list(inspect.signature(item.forward).parameters)[1:]:
        assert f"`{parameter}`" in text, parameter


def test_other_docstrings() -> None:
    for item in (c2bin_ext, functional):
        assert len(inspect.getdoc(item) or "") > 20
    for name in OUTPUTS:
        item = getattr(c2bin_ext, name)
        for field in item._fields:
            assert f"{field}:" in (inspect.getdoc(item) or "")
    assert inspect.getdoc(c2bin_ext.C2BINLoss.paper)
    assert inspect.getdoc(c2bin_ext.MultiScaleClusterHead.logits)
    for kind in (c2bin_ext.C2BINLoss, c2bin_ext.C2BINObjective):
        text = inspect.getdoc(kind.statistics) or ""
        assert re.match(r"\S.*\.\n\n", text)
        assert ">>> " in text
