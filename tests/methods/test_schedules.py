"""Which factors a schedule trains at each round and step, and what is no schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Layout, Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.schedules import Later, Schedule, schedule_of

A, B, AB = frozenset("A"), frozenset("B"), frozenset("AB")
PARTS = {"A": LORA_A, "B": LORA_B, "head": HEAD}
LAYOUT = Layout(Slot(f"{layer}.{letter}", layer, part, (2, 2)) for layer in "xy" for letter, part in PARTS.items())
FACTORS = Layout(slot for slot in LAYOUT.values() if slot.part != HEAD)


def letters_of(mask: frozenset[str]) -> frozenset[str]:
    """The factors of a mask, in which a trained head always is, and which says the same of every layer."""
    assert LAYOUT.of(HEAD) <= mask
    found = frozenset(letter for letter, part in PARTS.items() if letter != "head" and LAYOUT.of(part) <= mask)
    assert mask == LAYOUT.of(HEAD, *(PARTS[letter] for letter in found))
    return found


def active(schedule: Schedule, server_round: int, step: int) -> frozenset[str]:
    mask = schedule.mask(LAYOUT, server_round, step, {})
    assert schedule.mask(FACTORS, server_round, step, {}) == mask - LAYOUT.of(HEAD)
    return letters_of(mask)


def trained_in(schedule: Schedule, server_round: int, steps: int) -> frozenset[str]:
    return letters_of(schedule.trained_in(LAYOUT, server_round, steps, {}))


RUNS = st.lists(st.tuples(st.sampled_from("AB"), st.integers(1, 12), st.booleans()), min_size=1, max_size=5)


def spelled(runs: list[tuple[str, int, bool]]) -> tuple[str, list[str]]:
    """A pattern, and the letters it stands for; each run with a count or letter by letter."""
    text, letters = "", []
    for letter, count, counted in runs:
        text += f"{letter}{count}" if counted else letter * count
        letters += [letter] * count
    return text, letters


@given(RUNS, st.integers(0, 200), st.integers(1, 9))
def test_step_pattern_is_its_letters_in_turn_whatever_the_round(
    runs: list[tuple[str, int, bool]], step: int, server_round: int
) -> None:
    text, letters = spelled(runs)
    assert active(schedule_of(f"step:{text}"), server_round, step) == {letters[step % len(letters)]}


@given(RUNS, st.integers(0, 200), st.integers(1, 200))
def test_round_pattern_follows_the_server_round_whatever_the_step(
    runs: list[tuple[str, int, bool]], step: int, server_round: int
) -> None:
    text, letters = spelled(runs)
    assert active(schedule_of(f"round:{text}"), server_round, step) == {letters[(server_round - 1) % len(letters)]}


@given(RUNS, st.sampled_from(["step", "round"]), st.integers(1, 30), st.integers(1, 40))
def test_trained_in_a_round_is_the_union_of_its_steps(
    runs: list[tuple[str, int, bool]], by: str, server_round: int, local_steps: int
) -> None:
    schedule = schedule_of(f"{by}:{spelled(runs)[0]}")
    union = frozenset().union(*(active(schedule, server_round, k) for k in range(local_steps)))
    assert trained_in(schedule, server_round, local_steps) == union


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("step:BA", [B, A, B, A, B, A]),
        ("step:AB", [A, B, A, B, A, B]),
        ("step:BBA", [B, B, A, B, B, A]),
        ("step:B3A2", [B, B, B, A, A, B]),
        ("step:A10B", [A] * 10 + [B, A]),
        ("both", [AB] * 3),
        ("A", [A] * 3),
        ("B", [B] * 3),
    ],
)
def test_named_patterns_by_step(text: str, steps: list[frozenset[str]]) -> None:
    assert [active(schedule_of(text), 1, k) for k in range(len(steps))] == steps


def test_first_round_of_round_ba_trains_b_and_the_second_a() -> None:
    schedule = schedule_of("round:BA")
    assert [active(schedule, t, 0) for t in (1, 2, 3, 4)] == [B, A, B, A]


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("step:BA", 1, B),
        ("step:BA", 2, AB),
        ("step:B3A2", 3, B),
        ("step:B3A2", 4, AB),
        ("both", 1, AB),
        ("round:BA", 9, B),
    ],
)
def test_trained_in_the_first_round(text: str, steps: int, expected: frozenset[str]) -> None:
    assert trained_in(schedule_of(text), 1, steps) == expected


@pytest.mark.parametrize(
    ("text", "ever"),
    [("both", AB), ("A", A), ("B", B), ("step:BBA", AB), ("round:BA", AB), ("step:BB", B), ("round:A2", A)],
)
def test_ever_trained(text: str, ever: frozenset[str]) -> None:
    assert letters_of(schedule_of(text).ever(LAYOUT)) == ever


@pytest.mark.parametrize(
    "text",
    [
        "",
        "auto",
        "BA",
        "AB",
        "C",
        "a",
        "Both",
        "step",
        "step:",
        "round:",
        "step:C",
        "step:BC",
        "step:ba",
        "step:3B",
        "step:B-1",
        "step:B,A",
        "step:B A",
        " step:BA",
        "step:BA\n",
        "epoch:BA",
        "step:both",
        "step:round:BA",
        "step:B1000",
        "step:B0",
        "step:B0A",
        "step:B00",
    ],
)
def test_other_text_is_refused_with_key_value_and_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        schedule_of(text)
    assert "lora.schedule" in str(refusal.value)
    assert repr(text) in str(refusal.value)
    assert ":<pattern>" in str(refusal.value)


@pytest.mark.parametrize("text", ["B", "A", "step:BA", "round:AB"])
def test_a_schedule_of_factors_does_not_fit_a_form_without_them(text: str) -> None:
    biases = Layout([Slot("x.bias", "x", "bias", (3,), 0)])
    with pytest.raises(ConfigError, match=r"lora\.schedule = .*: the form trains no lora_"):
        schedule_of(text).fits(biases)
    schedule_of("both").fits(biases)
    assert schedule_of("both").mask(biases, 1, 0, {}) == {"x.bias"}


def test_a_shipped_schedule_takes_no_directive() -> None:
    assert schedule_of("step:BA").accepts(LAYOUT, {})
    assert not schedule_of("step:BA").accepts(LAYOUT, {"mask": ["x.A"]})


def test_schedules_that_do_the_same_are_equal_so_that_what_is_counted_of_them_is_kept() -> None:
    first, second = schedule_of("step:BA"), schedule_of("step:BA")
    assert first == second and hash(first) == hash(second) and first.by_round() == second.by_round()
    assert len({first, first.by_round(), schedule_of("step:AB"), schedule_of("B"), Later(first, 1), Later(first, 2)}) == 6
    assert Later(first, 1) == Later(second, 1) and Later(first, 1) != Later(first.by_round(), 1)
