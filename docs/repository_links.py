"""Hook of MkDocs: a page links to a file of the repository by its relative path, as on GitHub; the site carries a copy of it.

``[text](../lalora_flwr/api.py)`` in ``docs/page.md`` becomes a link to ``repository/lalora_flwr/api.py.txt``. A path that does
not exist stays as it is, so that the strict build reports it.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\(\.\./([\w./-]+)(#[\w-]+)?\)")


def linked(text: str, root: Path) -> set[str]:
    """The files of the repository that a page links to, relative to its root."""
    return {path for path, _ in LINK.findall(text) if (root / path).is_file()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a copy of each file that a page links to; as text, so that a browser shows it."""
    root = Path(config.config_file_path).parent
    texts = (file.content_string for file in list(files.documentation_pages()))
    for path in sorted(set().union(*(linked(text, root) for text in texts))):
        files.append(File.generated(config, f"repository/{path}.txt", content=(root / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the page's links name the copies."""
    del page, files
    root = Path(config.config_file_path).parent

    def copied(found: re.Match[str]) -> str:
        return f"](repository/{found[1]}.txt)" if (root / found[1]).is_file() else found[0]

    return LINK.sub(copied, markdown)
