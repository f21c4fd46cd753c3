"""Several works at once in one process, one of them running at a time, that meet to have something done together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")
Answer = Callable[[], A]  # gives it, or raises what went wrong


@dataclass
class _Worker(Generic[Q, A]):
    """Where a work stands.

    Attributes:
        back: gets something when it stops running: it asks, or ends.
        go: gets something when it may run on.
        question: what it waits for, if it waits.
        answer: what it gets.
        done: whether it has ended.
        given_up: whether nobody will answer any more.
    """

    back: SimpleQueue[None]
    go: SimpleQueue[None] = field(default_factory=SimpleQueue)
    question: list[Q] = field(default_factory=list)
    answer: list[Answer[A]] = field(default_factory=list)
    done: bool = False
    given_up: bool = False


class Meeting(Generic[Q, A]):
    """Runs works in turn until each has asked a question or ended, answers all questions together, and goes on.

    A work is a plain function; from inside it calls `ask`. Only one thread runs at any time, in a fixed order: what the works
    share needs no locks, and what they do follows from their order alone.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[Answer[A]]], size: int) -> None:
        """
        Args:
            answer: answers the questions that wait, in their order; runs in the thread that called `run`. What it raises ends all
                works.
            size: how many works there are at once, at most.
        """
        self._answer = answer
        self._pool = ThreadPoolExecutor(size, "lalora-site")
        self._here = threading.local()

    def run(self, works: Sequence[Callable[[], R]]) -> list[R]:
        """The works' results, in their order; what one raises is raised after all have ended.

        Whatever ends this call early, as an interrupt does, ends the works, too, at their next question: a process does not end
        while a thread of it waits.
        """
        back: SimpleQueue[None] = SimpleQueue()  # quicker than a semaphore
        workers: list[_Worker[Q, A]] = []
        try:
            futures = [self._started(work, back, workers) for work in works]
            while waiting := [worker for worker in workers if not worker.done]:
                answers = self._answer([worker.question.pop() for worker in waiting])
                for worker, answer in zip(waiting, answers, strict=True):
                    worker.answer.append(answer)
                    worker.go.put(None)
                    back.get()
        except BaseException:
            for worker in workers:
                worker.given_up = True
                worker.go.put(None)
            raise
        return [future.result() for future in futures]

    def ask(self, question: Q) -> A:
        """From inside a work: wait for the answer.

        Raises:
            RuntimeError: called from elsewhere.
            KeyboardInterrupt: nobody answers any more.
            Exception: what the answer raises.
        """
        worker: _Worker[Q, A] | None = getattr(self._here, "worker", None)
        if worker is None:
            raise RuntimeError("only a work of the meeting may ask")
        worker.question.append(question)
        worker.back.put(None)
        worker.go.get()
        if worker.given_up:
            worker.go.put(None)  # for whatever it asks on its way out
            raise KeyboardInterrupt("nobody answers any more")
        return worker.answer.pop()()

    def _started(self, work: Callable[[], R], back: SimpleQueue[None], workers: list[_Worker[Q, A]]) -> Future[R]:
        """The work in a thread, after it has asked its first question or ended."""
        worker: _Worker[Q, A] = _Worker(back)
        workers.append(worker)

        def all_of_it() -> R:
            self._here.worker = worker
            try:
                return work()
            finally:
                worker.done = True
                back.put(None)

        future = self._pool.submit(all_of_it)
        back.get()
        return future
