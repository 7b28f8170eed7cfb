"""Builds a static site from README, CONTRIBUTING and docs/ (`make docs`), for Sphinx with MyST.

The pages stay plain Markdown, with links that work in the repository too: the source folder is the
repository's root. The navigation is that of docs/README.md, and docs/site/api.rst adds docstrings.
"""

import pathlib
import posixpath
import re

import varjax

ROOT = pathlib.Path(__file__).parents[2]
INDEX = "docs/README"
FOLDERS = ("sampling", "tokenizers", "training", "data/sources", "convert/name_maps")

project = "varjax"
version = release = varjax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = INDEX
include_patterns = ["*.md", "docs/*.md", "docs/site/api.rst"]
include_patterns += [f"varjax/{folder}/README.md" for folder in FOLDERS]
# Sphinx does not descend into these, among them environments and runs.
exclude_patterns = [
    path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "varjax")
]
highlight_language = "text"
pygments_style = "friendly"

myst_heading_anchors = 4  # links to headings, by the names that GitHub gives them

default_role = "code"  # docstrings mark code as Markdown does
add_module_names = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # types are in `Args:` where they are not plain
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
smartquotes_action = "D"  # dashes, but no curly quotes around strings

html_theme = "furo"  # its fonts are the system's; nothing is fetched
html_title = "varjax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
html_copy_source = False
html_show_copyright = False
templates_path = ["templates"]


def navigation(text: str) -> str:
    """Returns the index of the documentation as Sphinx's navigation: a part for each heading.

    Args:
        text: docs/README.md.
    """
    parts = []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        caption, _, body = section.partition("\n")
        pages = [
            f"{title} <{posixpath.normpath(posixpath.join('/docs', link))}>"
            for title, link in re.findall(r"\[([^]]+)\]\(([^)#:]+)\.md\)", body)
        ]
        if caption == "Reference":
            pages.insert(0, "/docs/site/api")
        parts += ["```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```", ""]
    return "\n".join(parts)


def add_navigation(app, page, source):
    """Appends the navigation to the index, which the site begins with."""
    if page == INDEX:
        source[0] += "\n" + navigation(source[0])


def docstring_to_rest(app, what, name, thing, options, lines):
    """Rewrites a docstring in place as Sphinx's format, reST.

    What is indented after an empty line is a program, not a quote. Outside of programs and code,
    `|`, `*` and `@` are no markup.
    """
    rewritten, in_section = [], False
    for before, line in zip(["", *lines[:-1]], lines, strict=True):
        if line and not line.startswith(" "):
            in_section = bool(re.match(r"[A-Z]\w+:$", line))  # Args:, Returns:, Raises:
        program = line.startswith("    ") and not in_section
        if program and not before:
            rewritten += [".. code-block:: python", ""]
        if not program:
            line = re.sub(r"`[^`]*`|([|*@])", lambda m: f"\\{m[1]}" if m[1] else m[0], line)
        rewritten.append(line)
    lines[:] = rewritten


def setup(app):
    app.connect("source-read", add_navigation)
    # Before Napoleon, which replaces the sections' own indented lines.
    app.connect("autodoc-process-docstring", docstring_to_rest, priority=400)
