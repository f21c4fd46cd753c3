"""A little app as a bundle."""

from __future__ import annotations

from functools import cache

from flwr.cli.build import build_fab_from_files

from lalora_flwr.site.bundle import Bundle, parse

PROJECT = """[project]
name = "little"
version = "1.2.3"
dependencies = ["flwr>=1.41"]
license = { file = "LICENSE" }
[tool.flwr.app]
publisher = "lalora"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "little.server:app"
clientapp = "little.client:app"
"""


@cache
def bundle(code: str = "app = 1\n") -> Bundle:
    files = {"pyproject.toml": PROJECT, "little/client.py": code, "little/server.py": "app = 1\n", "LICENSE": "free"}
    return parse(build_fab_from_files({name: text.encode() for name, text in files.items()})[0])
