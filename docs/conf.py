"""Sphinx's settings: `make docs` builds the site into site/, and every warning is an error."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import myst_nb.sphinx_ext
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
for folder in (ROOT / "docs" / "_ext", ROOT / "integrations", ROOT):
    sys.path.insert(0, str(folder))
# Tutorials run in processes of their own, with the packages of this checkout.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

from c2bin_ext import __version__  # noqa: E402

_URLS = [
    line.split(", ") for line in importlib.metadata.metadata("c2bin-ext").get_all("Project-URL", [])
]

project = "c2bin-ext"
author = "The c2bin-ext authors"
version = release = __version__
html_title = f"c2bin-ext {__version__}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
    "docstrings",
]
exclude_patterns = ["results/**.md", "_ext"]
nitpicky = True
# Torch's and Python's own names have no page here unless intersphinx is on.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|typing|typing_extensions|os|numpy|np|npt|hypothesis)\b.*"),
    (r"py:.*", r"(lightly|pytorch_lightning|solo|omegaconf)\b.*"),
    (r"py:(class|exc|obj)", r"[A-Za-z]+"),
    (r"py:class", r"c2bin_\w+\.(\w+\.)*(_\w+|[A-Z]\w*)"),
]

# A build needs no network. With INTERSPHINX=1 it links to torch's and lightly's own pages.
if os.environ.get("INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightly": ("https://docs.lightly.ai/self-supervised-learning", None),
    }

# The adapter of solo-learn is documented where solo-learn is not installed, too.
autodoc_mock_imports = [
    name
    for name in ("solo", "omegaconf", "lightning", "hydra")
    if importlib.util.find_spec(name) is None
]
autodoc_default_options = {"members": True, "member-order": "bysource", "inherited-members": False}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70
add_module_names = False

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
# Executed notebooks are written beside the site, under this name.
myst_nb.sphinx_ext.OUTPUT_FOLDER = "build/notebooks"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_theme_options: dict[str, Any] = {
    "footer_icons": [
        {"name": name, "url": url, "html": name, "class": "url"} for name, url in _URLS
    ]
}
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}


def _copy_mathjax(app: Sphinx) -> None:
    """Ship MathJax with the pages: the script and its fonts, out of a package on PyPI."""
    package = importlib.metadata.distribution("sphinx-mathjax-offline")
    source = Path(str(package.locate_file("sphinx-mathjax-offline/static/mathjax")))
    target = Path(app.outdir) / "_static" / "mathjax"
    shutil.copytree(
        source / "output" / "chtml" / "fonts" / "woff-v2",
        target / "output" / "chtml" / "fonts" / "woff-v2",
        dirs_exist_ok=True,
    )
    shutil.copy(source / "tex-chtml.js", target)


def setup(app: Sphinx) -> None:
    """Connect what this file adds to the build.

    Args:
        app: the Sphinx application.
    """
    app.connect("builder-inited", _copy_mathjax)
