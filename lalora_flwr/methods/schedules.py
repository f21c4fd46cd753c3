"""Which slots train at server round t and local step k.

Values of the run-config key ``lora.schedule``:

    both          A and B at every step, and everything else that a form trains
    B  or  A      that factor only
    step:BA       by local step: B, A, B, A, …; any pattern: step:AB, step:BBA, step:B3A2 (three B steps, two A steps); where
                  a round is one local step, by round
    round:BA      by server round: B in round 1, A in round 2, …; any pattern likewise

They name the factors of LoRA; slots that are no factors (a trained head) train at every step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Mask
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings.choices import SCHEDULES
from lalora_flwr.wire.public import Public

FACTORS = {"A": LORA_A, "B": LORA_B}
STEP, ROUND = "step", "round"
MOST_LOOKED_AT = 1000  # rounds of a schedule, before a run


class Schedule:
    """What trains when. It looks at public things only: the layout, the counters and the server's directive.

    Attributes:
        text: its name with its argument, as keys, ledgers and summaries write it.
        period: local steps of a round after which the masks repeat; 0 if they never do.
    """

    text: str
    period: int = 0

    def parse(self, argument: str) -> Schedule:
        """The schedule of this kind with an argument, the text behind the colon.

        Raises:
            ValueError: the argument is not one of its own; with what the key "must be".
        """
        if argument:
            raise ValueError(f"{self.text}, with nothing behind a colon")
        return self

    def fits(self, layout: Layout) -> None:
        """Check that the form trains what the schedule names.

        Raises:
            ConfigError: if it does not.
        """
        self.fits_parts(layout.only(layout.trainable).parts)

    def fits_parts(self, parts: frozenset[str]) -> None:
        """As `fits`, of the parts alone: what can be said before a model is loaded."""

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        """The slots that train: ``server_round`` counts from 1, ``step`` from 0 within the round. Never none."""
        raise NotImplementedError

    def ever(self, layout: Layout) -> Mask:
        """The slots that train in some round of a long enough run; the others stay as the seed draws them."""
        return layout.trainable

    def within(self, layout: Layout, directive: Public) -> Layout:
        """The slots that a round works with under a directive: all of them, each whole or a leading corner of it.

        What is left out of a corner must not matter to the model, as components beyond the rank whose B is zero: a site neither
        runs, clips nor noises it.
        """
        return layout

    def by_round(self) -> Schedule:
        """The same where a round is one local step, so that what advances by step advances by round."""
        return self

    def accepts(self, layout: Layout, directive: Public) -> bool:
        """Whether a directive is one that this schedule understands. A site refuses any other."""
        return not directive

    def foreseen(self, layout: Layout, server_round: int, directive: Public) -> Public:
        """The directive of a round as far as it can be told before the run, from that of the first: for rates and plans."""
        return directive

    def masks(self, layout: Layout, server_round: int, local_steps: int, directive: Public) -> list[Mask]:
        """The masks of a round's first steps, up to where they repeat."""
        return [self.mask(layout, server_round, k, directive) for k in range(min(local_steps, self.period or local_steps))]

    def trained_in(self, layout: Layout, server_round: int, local_steps: int, directive: Public) -> Mask:
        """The slots that train at least once in the round."""
        return frozenset().union(*self.masks(layout, server_round, local_steps, directive))


class Pattern(Schedule):
    """A repeating pattern of trained factors, advanced by local step or by server round."""

    def __init__(self, text: str, pattern: Iterable[str], *, by_round: bool = False) -> None:
        """
        Args:
            text: how it is written.
            pattern: the letters of the factors that train together, one text per step or round.
            by_round: whether rounds advance it, not local steps.
        """
        self.text, self.pattern, self._by_round = text, tuple(pattern), by_round
        self.period = 1 if by_round else len(self.pattern)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[str, tuple[str, ...], bool]:
        return self.text, self.pattern, self._by_round

    def by_round(self) -> Schedule:
        if self._by_round or len(self.pattern) == 1:
            return self
        return Pattern(self.text.replace(STEP, ROUND, 1), self.pattern, by_round=True)

    def fits_parts(self, parts: frozenset[str]) -> None:
        if self.pattern == ("AB",):
            return
        for letter in sorted(set("".join(self.pattern))):
            if FACTORS[letter] not in parts:
                raise ConfigError(f"lora.schedule = {self.text!r}: the form trains no {FACTORS[letter]}; take 'both'")

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        index = server_round - 1 if self._by_round else step
        return _with(layout, self.pattern[index % len(self.pattern)])

    def ever(self, layout: Layout) -> Mask:
        return _with(layout, "".join(self.pattern))


def _with(layout: Layout, letters: str) -> Mask:
    still = [part for letter, part in FACTORS.items() if letter not in letters]
    return layout.trainable - layout.of(*still)


class Later(Schedule):
    """Another schedule, a number of rounds later: what comes before is not its own."""

    def __init__(self, schedule: Schedule, rounds: int) -> None:
        self._schedule, self._rounds = schedule, rounds
        self.text, self.period = schedule.text, schedule.period

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Later) and (self._schedule, self._rounds) == (other._schedule, other._rounds)

    def __hash__(self) -> int:
        return hash((self._schedule, self._rounds))

    def fits(self, layout: Layout) -> None:
        self._schedule.fits(layout)

    def fits_parts(self, parts: frozenset[str]) -> None:
        self._schedule.fits_parts(parts)

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        return self._schedule.mask(layout, max(1, server_round - self._rounds), step, directive)

    def ever(self, layout: Layout) -> Mask:
        return self._schedule.ever(layout)

    def within(self, layout: Layout, directive: Public) -> Layout:
        return self._schedule.within(layout, directive)

    def accepts(self, layout: Layout, directive: Public) -> bool:
        return self._schedule.accepts(layout, directive)

    def foreseen(self, layout: Layout, server_round: int, directive: Public) -> Public:
        return self._schedule.foreseen(layout, max(1, server_round - self._rounds), directive)


class Patterns(Schedule):
    """``step`` or ``round`` before a pattern is named."""

    def __init__(self, text: str, *, by_round: bool) -> None:
        self.text, self._by_round = text, by_round

    def parse(self, argument: str) -> Schedule:
        if not re.fullmatch(r"(?:[AB](?:[1-9]\d{0,2})?)+", argument):
            raise ValueError(f"{self.text}:<pattern> with a pattern of the letters A and B such as BA, BBA or B3A2")
        letters = "".join(letter * int(count or 1) for letter, count in re.findall(r"([AB])(\d*)", argument))
        return Pattern(f"{self.text}:{argument}", letters, by_round=self._by_round)


BOTH = Pattern("both", ["AB"])
ONLY_A = Pattern("A", ["A"])
ONLY_B = Pattern("B", ["B"])
BY_STEP = Patterns(STEP, by_round=False)
BY_ROUND = Patterns(ROUND, by_round=True)


def schedule_of(text: str) -> Schedule:
    """The schedule that a value of ``lora.schedule`` names.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    name, _, argument = text.partition(":")
    wanted = f"auto or one of {', '.join(SCHEDULES.names())}, step and round as step:<pattern>"
    if name in SCHEDULES:
        try:
            schedule = SCHEDULES.get(name, Schedule).parse(argument)
            if schedule.text == text:
                return schedule
        except ValueError as problem:
            wanted = str(problem)
    raise ConfigError(f"lora.schedule = {text!r}: must be {wanted}")
