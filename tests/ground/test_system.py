"""A system without file locks is refused where the package is imported, in a line that says what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lalora_flwr.ground.system import POSIX_ONLY, require_posix


def test_this_system_has_all_that_is_needed() -> None:
    require_posix()


def test_a_system_without_one_of_them_is_refused_in_one_line() -> None:
    with pytest.raises(ImportError) as caught:
        require_posix([*POSIX_ONLY, "no_such_module"])
    said = str(caught.value)
    assert "lacks no_such_module" in said and "WSL" in said and "\n" not in said


@pytest.mark.parametrize("module", POSIX_ONLY)
def test_the_package_says_so_before_anything_else(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import lalora_flwr"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: lalora-flwr runs on Linux") and f"lacks {module} " in last
