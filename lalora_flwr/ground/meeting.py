"""Several works at once in one process, one of them running at a time, that meet to have something done together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")
Answer = Callable[[], A]  # gives it, or raises what went wrong


@dataclass
class _Worker(Generic[Q, A]):
    """Where a work stands.

    Attributes:
        go: set when it may run on.
        question: what it waits for, if it waits.
        answer: what it gets.
        done: whether it has ended.
    """

    go: threading.Event = field(default_factory=threading.Event)
    question: list[Q] = field(default_factory=list)
    answer: list[Answer[A]] = field(default_factory=list)
    done: bool = False


class Meeting(Generic[Q, A]):
    """Runs works in turn until each has asked a question or ended, answers all questions together, and goes on.

    A work is a plain function; from inside it calls `ask`. Only one thread runs at any time, in a fixed order: what the works
    share needs no locks, and what they do follows from their order alone.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[Answer[A]]], size: int) -> None:
        """
        Args:
            answer: answers the questions that wait, in their order; runs in the thread that called `run`. Must not raise.
            size: how many works there are at once, at most.
        """
        self._answer = answer
        self._pool = ThreadPoolExecutor(size, "lalora-site")
        self._here = threading.local()
        self._back = threading.Semaphore(0)  # released when the running work stops running

    def run(self, works: Sequence[Callable[[], R]]) -> list[R]:
        """The works' results, in their order; what one raises is raised after all have ended."""
        workers = [_Worker[Q, A]() for _ in works]
        futures = [self._started(work, worker) for work, worker in zip(works, workers, strict=True)]
        while waiting := [worker for worker in workers if not worker.done]:
            answers = self._answer([worker.question.pop() for worker in waiting])
            for worker, answer in zip(waiting, answers, strict=True):
                worker.answer.append(answer)
                worker.go.set()
                self._back.acquire()
        return [future.result() for future in futures]

    def ask(self, question: Q) -> A:
        """From inside a work: wait for the answer.

        Raises:
            RuntimeError: called from elsewhere.
            Exception: what the answer raises.
        """
        worker: _Worker[Q, A] | None = getattr(self._here, "worker", None)
        if worker is None:
            raise RuntimeError("only a work of the meeting may ask")
        worker.question.append(question)
        self._back.release()
        worker.go.wait()
        worker.go.clear()
        return worker.answer.pop()()

    def _started(self, work: Callable[[], R], worker: _Worker[Q, A]) -> Future[R]:
        """The work in a thread, after it has asked its first question or ended."""

        def all_of_it() -> R:
            self._here.worker = worker
            try:
                return work()
            finally:
                worker.done = True
                self._back.release()

        future = self._pool.submit(all_of_it)
        self._back.acquire()
        return future
