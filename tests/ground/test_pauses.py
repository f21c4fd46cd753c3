"""How long to wait before the next look."""

from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.ground.pauses import LEAST, SHARE, pause


@given(st.floats(0, 1e6))
def test_a_pause_adds_at_most_a_tenth_of_what_passed_and_is_bounded(waited: float) -> None:
    assert LEAST <= pause(waited) <= 3
    assert pause(waited) <= max(LEAST, SHARE * waited)
    assert pause(waited) <= pause(waited + 1)
