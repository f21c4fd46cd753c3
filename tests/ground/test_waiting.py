"""What a command says while it works: never nothing for long, and nothing on stdout that a script would read."""

from __future__ import annotations

import io
import itertools
import threading

import pytest
from rich.console import Console

from lalora_flwr.ground.waiting import FIRST, Waiting


def test_away_from_a_terminal_lines_come_more_and_more_rarely() -> None:
    said, waited = io.StringIO(), []
    waiting = Waiting(Console(file=io.StringIO()), "noise", stream=said)
    answers = itertools.chain([False, False, True, False], itertools.repeat(True))

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        if len(waited) == 3:
            waiting.now("data")
        if len(waited) == 5:
            waiting.__exit__()
        return next(answers)

    waiting.tell(wait)
    assert waited == [FIRST, 2 * FIRST, 4 * FIRST, FIRST, 2 * FIRST]  # from the start again when there is something new
    assert [line.partition(":")[0] for line in said.getvalue().splitlines()] == ["noise", "noise", "data"]
    assert all(line.endswith(" s so far") for line in said.getvalue().splitlines())


def test_short_work_says_nothing_and_leaves_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    for _ in range(20):
        with Waiting(Console(), "short"):
            pass
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.daemon and thread.name.startswith("Thread-"):
            thread.join(timeout=5)
    assert threading.active_count() <= before and capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_moves_and_goes_away() -> None:
    shown = io.StringIO()
    with Waiting(Console(file=shown, force_terminal=True, width=100), "starting", 4) as waiting:
        waiting.now("round 3 of 4", 2)
    text = shown.getvalue()
    assert "round 3 of 4" in text and "2/4" in text and text.endswith("\x1b[2K")  # the line is cleared
