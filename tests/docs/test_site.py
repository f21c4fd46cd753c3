"""The documentation as a site: its navigation, the links of all pages on GitHub and on the site, and the build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from lalora_flwr import api
from tests.docs.blocks import DOCS, ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INSTALLED = all(find_spec(name) for name in ("mkdocs", "material", "mkdocstrings"))


def nav(part: Any) -> Iterator[str]:
    """The pages that a part of the navigation names."""
    if isinstance(part, str):
        yield part
    for below in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from nav(below)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def slug(heading: str) -> str:
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def broken(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def test_the_navigation_lists_every_page_once() -> None:
    listed = list(nav(CONFIG["nav"]))
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_drawing_is_used_and_can_be_read_without_seeing_it() -> None:
    texts = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    drawings = list((DOCS / "drawings").iterdir())
    assert len(drawings) == 2
    for drawing in drawings:
        content = drawing.read_text(encoding="utf-8")
        assert f"(drawings/{drawing.name})" in texts
        assert "<title" in content and "<desc" in content and content.count("<text") > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page, page.read_text(encoding="utf-8"))


def test_the_test_of_links_notices() -> None:
    page = DOCS / "index.md"
    assert broken(page, "[a](nowhere.md) [b](choose.md#nowhere) [c](../nowhere.py) [d](#nowhere)") == [
        *("nowhere.md", "choose.md#nowhere", "../nowhere.py", "#nowhere")
    ]
    assert not broken(page, "[a](choose.md#in-short) [b](../SECURITY.md) [c](https://flower.ai) `[d](nowhere.md)`")


def test_files_of_the_repository_are_linked_where_they_are() -> None:
    """The site carries copies of files, and none of folders or of what is outside of the repository."""
    for page in DOCS.glob("*.md"):
        for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
            if link.startswith("../"):
                assert (ROOT / link.removeprefix("../").partition("#")[0]).is_file(), (page.name, link)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra docs")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} <= set(pages)
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="(https?:)?//', text)
        assert not loaded, name
    for function in ("settings", "plan", "run", "compare", "audit", "verify"):
        assert hasattr(api, function) and f'id="lalora_flwr.api.{function}"' in pages["api"]
    for extended in ("methods.method.Method", "methods.merges.Merge", "adapter.form.AdapterForm", "data.named.NamedDataSet"):
        assert f'id="lalora_flwr.{extended}"' in pages["api"]
    assert 'href="repository/lalora_flwr/api.py.txt"' in pages["api"]
    copied = tmp_path / "site" / "repository" / "lalora_flwr" / "api.py.txt"
    assert copied.read_bytes() == (ROOT / "lalora_flwr" / "api.py").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra docs")
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "lalora_flwr").symlink_to(ROOT / "lalora_flwr")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "repository_links.py").write_bytes((DOCS / "repository_links.py").read_bytes())
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\nhooks: [docs/repository_links.py]\nexclude_docs: '*.py'\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    for text, built in (("[a](../lalora_flwr/api.py)", True), ("[a](../lalora_flwr/nowhere.py)", False)):
        (tmp_path / "docs" / "index.md").write_text(text)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) is built, done.stdout + done.stderr
