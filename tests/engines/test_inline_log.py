"""The in-process engine's log of a run, which begins before the run has a folder."""

from __future__ import annotations

import logging
from pathlib import Path

from lalora_flwr.engines.inline import logs_in


def test_what_is_said_before_there_is_a_folder_is_kept(tmp_path: Path) -> None:
    site, path = logging.getLogger("lalora_flwr.site"), tmp_path / "run" / "flower.log"
    with logs_in(path):
        site.warning("3 of 9 rows left out")
        assert not path.parent.exists()
        path.parent.mkdir()
        site.warning("later")
    lines = path.read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["3 of 9 rows left out", "later"]
    with logs_in(tmp_path / "never" / "flower.log"):
        site.warning("said to nobody")
    assert not (tmp_path / "never").exists()
