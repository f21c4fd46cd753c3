from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.schedules import parse_schedule

A, B, AB = frozenset("A"), frozenset("B"), frozenset("AB")
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
    assert parse_schedule(f"step:{text}").active(server_round, step) == {letters[step % len(letters)]}


@given(RUNS, st.integers(0, 200), st.integers(1, 200))
def test_round_pattern_follows_the_server_round_whatever_the_step(
    runs: list[tuple[str, int, bool]], step: int, server_round: int
) -> None:
    text, letters = spelled(runs)
    assert parse_schedule(f"round:{text}").active(server_round, step) == {letters[(server_round - 1) % len(letters)]}


@given(RUNS, st.sampled_from(["step", "round"]), st.integers(1, 30), st.integers(1, 40))
def test_trained_in_a_round_is_the_union_of_its_steps(
    runs: list[tuple[str, int, bool]], by: str, server_round: int, local_steps: int
) -> None:
    schedule = parse_schedule(f"{by}:{spelled(runs)[0]}")
    union = frozenset().union(*(schedule.active(server_round, k) for k in range(local_steps)))
    assert schedule.trained_in(server_round, local_steps) == union


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
    assert [parse_schedule(text).active(1, k) for k in range(len(steps))] == steps


def test_first_round_of_round_ba_trains_b_and_the_second_a() -> None:
    schedule = parse_schedule("round:BA")
    assert [schedule.active(t, 0) for t in (1, 2, 3, 4)] == [B, A, B, A]


@pytest.mark.parametrize(
    ("text", "steps", "trained"),
    [
        ("step:BA", 1, B),
        ("step:BA", 2, AB),
        ("step:B3A2", 3, B),
        ("step:B3A2", 4, AB),
        ("both", 1, AB),
        ("round:BA", 9, B),
    ],
)
def test_trained_in_the_first_round(text: str, steps: int, trained: frozenset[str]) -> None:
    assert parse_schedule(text).trained_in(1, steps) == trained


@pytest.mark.parametrize(
    ("text", "ever"),
    [("both", AB), ("A", A), ("B", B), ("step:BBA", AB), ("round:BA", AB), ("step:BB", B), ("round:A2", A)],
)
def test_ever_trained(text: str, ever: frozenset[str]) -> None:
    assert parse_schedule(text).ever_trained == ever


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
        parse_schedule(text)
    assert "lora.schedule" in str(refusal.value)
    assert repr(text) in str(refusal.value)
    assert "step:<pattern>" in str(refusal.value)
