"""The order of the packages: nothing imports upwards, inside functions neither, so there is no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lalora_flwr

ROOT = Path(lalora_flwr.__file__).parent
ORDER = (  # low to high; docs/architecture.md says what each holds
    *(
        "ground",
        "settings",
        "privacy",
        "ledger",
        "wire",
        "tasks",
        "data",
        "models",
        "adapter",
        "gradients",
        "methods",
        "training",
        "cost",
    ),
    *("site", "server", "engines", "compare", "diagnose", "audit", "api", "cli", "__main__", "client_app", "server_app"),
)
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 300


def layer(module: str) -> str:
    """The package, or the module at the top, that a module of this package belongs to."""
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "lalora_flwr" else [node.module]
        yield from (name for name in names if name.startswith("lalora_flwr.") and name != "lalora_flwr.__version__")


def of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("package", ORDER)
def test_nothing_imports_upwards(package: str) -> None:
    above = set(ORDER[ORDER.index(package) + 1 :])
    files = [path for path in FILES if of(path) == package]
    assert files
    found = {(str(path.relative_to(ROOT)), name) for path in files for name in imports(path) if layer(name) in above}
    assert not found


def test_every_module_has_a_place_in_the_order() -> None:
    assert {of(path) for path in FILES} - {"__init__"} == set(ORDER)
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "api", "client_app", "server_app"}


def test_the_test_sees_an_import_wherever_it_stands(tmp_path: Path) -> None:
    source = "from lalora_flwr import cli\nimport lalora_flwr.site.app\ndef f():\n    from lalora_flwr.data.inputs import rows\n"
    (tmp_path / "x.py").write_text(source)
    assert {layer(name) for name in imports(tmp_path / "x.py")} == {"cli", "site", "data"}


def test_no_file_is_long() -> None:
    files = [*FILES, *(ROOT.parent / "tests").rglob("*.py")]
    assert not {path.name: n for path in files if (n := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES}


def test_the_readme_names_every_package() -> None:
    shown = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    assert not [package for package in ORDER if package not in shown and package != "__main__"]
