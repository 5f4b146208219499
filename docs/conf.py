"""Sphinx: the docstrings are written with its roles, and what it builds can be read and searched without a server."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402  # beside this file, which is no package

project = "diffgraft"
author = "the diffgraft authors"
project_copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["requirements.txt", "changelog/*", "community/*"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # they hold what `python docs/notebooks.py` has given

html_theme = "furo"
html_title = "diffgraft"
html_static_path = ["static"]
html_css_files = ["docs.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # it would be fetched, which a page opened as a file may not do
html_math_renderer = "mathml"
html_theme_options = {"footer_icons": [], "navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_exclude = ".linenos, .gp"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

COLUMNS = re.compile(r"^(?P<term>\S.*?\S|\S)\s{2,}(?P<text>\S.*)$")


def as_rest(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A docstring lists attributes in two columns (``name    what it is``) and indents examples; reST wants lists and a mark for those."""
    new: list[str] = []
    listing = False
    for number, line in enumerate(lines):
        apart = number > 1 and not lines[number - 1].strip() and not lines[number - 2].startswith(" ")
        if line.startswith("    ") and apart and not listing:
            new += ["::", ""]
        entry = COLUMNS.match(line)
        follows = number > 0 and bool(lines[number - 1].strip())
        if entry and (listing or not follows) and not line.startswith(("..", ":", "-", "*")):
            new += ["", f"{literal(entry['term'])}", f"   {entry['text']}"]
            listing = True
        elif listing and line.startswith(" ") and line.strip():
            new.append(f"   {line.strip()}")
        else:
            if listing and line.strip():
                new.append("")
            listing = listing and bool(line.strip())
            new.append(line)
    lines[:] = new


def lead(app: Any, docname: str, source: list[str]) -> None:
    """Links to READMEs and tables of the repository lead to their pages here."""
    if not docname.startswith("generated/"):
        source[0] = generate.led(source[0], Path(app.env.doc2path(docname)).parent, app.config.diffgraft_sources)


def literal(term: str) -> str:
    """The first column of such a list, set as code."""
    return ", ".join(f"``{part.strip('`')}``" for part in re.split(r",\s+", term))


def inline_math(self: Any, node: Any) -> None:
    """Formulas as MathML, which browsers draw by themselves: no script, no font, no network."""
    self.body.append(convert(node.astext()))
    raise SkipNode


def display_math(self: Any, node: Any) -> None:
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.add_config_value("diffgraft_sources", generate.sources(), "")
    app.connect("source-read", lead)
    app.connect("autodoc-process-docstring", as_rest, priority=400)  # before napoleon
    generate.write_all(HERE / "generated")
