from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from lalora_flwr.ground.meeting import Meeting

Answer = Callable[[], int]


def doubled(questions: Sequence[int]) -> list[Answer]:
    return [lambda question=question: 2 * question for question in questions]  # type: ignore[misc]


def test_works_meet_and_each_gets_its_own_answer() -> None:
    rounds: list[list[int]] = []

    def answer(questions: Sequence[int]) -> list[Answer]:
        rounds.append(list(questions))
        return doubled(questions)

    meeting = Meeting[int, int](answer, 3)

    def work(start: int, times: int) -> Callable[[], list[int]]:
        return lambda: [meeting.ask(start + time) for time in range(times)]

    assert meeting.run([work(10, 3), work(20, 1), work(30, 2)]) == [[20, 22, 24], [40], [60, 62]]
    assert rounds == [[10, 20, 30], [11, 31], [12]]
    assert meeting.run([work(1, 1)]) == [[2]]  # it can be used again


def test_only_one_work_runs_at_a_time_in_a_fixed_order() -> None:
    running, log = threading.Lock(), []
    meeting = Meeting[int, int](doubled, 4)

    def work(name: int) -> Callable[[], None]:
        def all_of_it() -> None:
            for step in range(5):
                assert running.acquire(blocking=False)
                log.append((step, name))
                running.release()
                meeting.ask(name)

        return all_of_it

    meeting.run([work(name) for name in range(4)])
    assert log == [(step, name) for step in range(5) for name in range(4)]


def test_a_fault_is_its_own_works() -> None:
    def answer(questions: Sequence[int]) -> list[Answer]:
        def refuse() -> int:
            raise ValueError("no")

        return [refuse if question == 2 else given for question, given in zip(questions, doubled(questions), strict=True)]

    ended: list[int] = []
    meeting = Meeting[int, int](answer, 3)

    def work(question: int) -> Callable[[], int]:
        def all_of_it() -> int:
            try:
                return meeting.ask(question) + meeting.ask(question + 10)
            finally:
                ended.append(question)

        return all_of_it

    with pytest.raises(ValueError, match="no"):
        meeting.run([work(1), work(2), work(3)])
    assert sorted(ended) == [1, 2, 3]  # the others went on to their end
    assert meeting.run([work(5)]) == [40]


def test_nobody_else_may_ask() -> None:
    with pytest.raises(RuntimeError, match="only a work"):
        Meeting[int, int](doubled, 1).ask(1)


def test_an_interrupt_ends_all_works() -> None:
    """A thread that waited for ever would keep the process from ending."""
    ended: list[str] = []
    rounds = iter([None, KeyboardInterrupt("stop")])

    def answer(questions: Sequence[int]) -> list[Answer]:
        if fault := next(rounds):
            raise fault
        return doubled(questions)

    def work(name: str) -> Callable[[], None]:
        def all_of_it() -> None:
            try:
                for _ in range(5):
                    meeting.ask(1)
            except KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    meeting.ask(2)  # on its way out
                raise
            finally:
                ended.append(name)

        return all_of_it

    meeting = Meeting[int, int](answer, 2)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        meeting.run([work("a"), work("b")])
    meeting._pool.shutdown(wait=True)  # hangs if one of them waits
    assert sorted(ended) == ["a", "b"]
