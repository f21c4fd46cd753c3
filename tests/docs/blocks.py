"""Fenced blocks of a page, and what an HTML comment on the line above says of each.

``<!-- not run by the tests: REASON -->``: it needs what a test machine lacks. ``<!-- folder: NAME -->``: where it is run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"(?:^<!-- (not run by the tests|folder): ([^\n]*?) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``kind`` is its language."""

    kind: str
    text: str
    needs: str = ""  # what a test machine lacks
    folder: str = ""

    def commands(self, program: str) -> list[list[str]]:
        """The arguments of each call of a program, the text of its here documents left out."""
        text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", self.text.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
        found = []
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            end = next((at for at, word in enumerate(words) if word in (">", ">>", "|", "&&", "&")), len(words))
            if words[:1] == [program]:
                found.append(words[1:end])
        return found

    def run(self, folder: Path, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
        """In Bash, which ends at the first command that fails; ``lalora`` and ``python`` are those of the tests."""
        path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
        command = ["bash", "-euo", "pipefail", "-c", self.text]
        return subprocess.run(command, cwd=folder, env={**env, "PATH": path}, capture_output=True, text=True, timeout=900)


def blocks(page: str, kind: str = "bash") -> list[Block]:
    """The blocks of a language, in order; those in quotes and lists, which are indented, are none."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [
        Block(language, body, *({"folder": ("", said), "": ("", "")}.get(about, (said, ""))))
        for about, said, language, body in _BLOCK.findall(text)
        if language == kind
    ]


def of_section(page: str, heading: str) -> list[Block]:
    """The Bash blocks below a heading, up to the next one."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", _without_code(text), re.DOTALL | re.MULTILINE)
    return [block for block in blocks(page) if _key(block.text) in part]


def _key(code: str) -> str:
    return f"code {hash(code)}"


def _without_code(text: str) -> str:
    """Comments in code look like headings: each block is replaced by its key."""
    return re.sub(r"^```\w*\n(.*?)^```$", lambda found: _key(found[1]), text, flags=re.DOTALL | re.MULTILINE)
