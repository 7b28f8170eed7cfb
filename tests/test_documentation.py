"""Tests the documentation's index and links, and its site (`make docs`)."""

import importlib.util
import posixpath
import re
import subprocess
import sys

import pytest

import varjax
from tests.helpers.paths import ROOT

INDEX = "docs/README.md"
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "varjax/**/README.md")
    for path in ROOT.glob(pattern)
)


def text(page: str) -> str:
    """Returns a page without its code blocks, which contain no links or headings."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)


def links(page: str) -> list[tuple[str, str]]:
    """Returns (path from the root, heading) of each link within the repository."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, heading = target.partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
            found.append((path if target[0] != "#" else page, heading))
    return found


def headings(page: str) -> set[str]:
    """Returns the anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text(page), flags=re.M)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def site():
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs/site/conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_lists_every_page_once():
    # Links to headings belong to reading paths, which may repeat a page.
    listed = [path for path, heading in links(INDEX) if path.endswith(".md") and not heading]
    missing = set(PAGES) - {INDEX, *listed}
    assert not missing, f"add to {INDEX}, where the reader looks for them: {sorted(missing)}"
    assert sorted(listed) == [page for page in PAGES if page != INDEX]


def test_links_resolve():
    checked = 0
    for page in PAGES:
        for path, heading in links(page):
            assert (ROOT / path).exists(), f"{page} links to {path}"
            assert not heading or heading in headings(path), f"{page} links to {path}#{heading}"
            checked += 1
    assert checked > 100


def test_the_site_navigation_matches_the_index():
    navigation = site().navigation((ROOT / INDEX).read_text())
    pages = re.findall(r"^(?:.* <)?/([^>\n]+)>?$", navigation, flags=re.M)
    assert sorted(pages) == sorted(["docs/site/api"] + [p[:-3] for p in PAGES if p != INDEX])
    captions = re.findall(r"^:caption: (.*)$", navigation, flags=re.M)
    assert captions == re.findall(r"^## (.*)$", (ROOT / INDEX).read_text(), flags=re.M)


def test_every_public_name_is_in_the_api_reference():
    reference = (ROOT / "docs/site/api.rst").read_text()
    listed = re.findall(r"^\.\. auto\w+:: varjax\.(\w+)(?:\(\))?$", reference, flags=re.M)
    # The module also contains two names that it imports, which are not public.
    public = {
        name
        for name in dir(importlib.import_module("varjax.api"))
        if not name.startswith("_") and name not in ("TYPE_CHECKING", "importlib")
    }
    assert sorted(listed) == sorted(public) and public < set(dir(varjax))


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs `make docs`, which installs Sphinx")
    folders = ["-d", tmp_path / "doctrees", ROOT, tmp_path / "site"]
    options = ["--quiet", "--fail-on-warning", "-c", ROOT / "docs/site"]
    subprocess.run([sys.executable, "-m", "sphinx", *options, *folders], check=True)
    assert "VARPipeline" in (tmp_path / "site/docs/site/api.html").read_text()
