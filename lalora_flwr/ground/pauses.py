"""How long to wait before looking again for something that comes when it comes."""

LEAST, SHARE = 0.2, 0.1  # seconds; of the time that has passed


def pause(waited: float, most: float = 3.0) -> float:
    """Seconds until the next look, after ``waited`` seconds: at most a tenth longer than what is waited for took.

    Whoever is looked at is asked often only by those who wait for something short.

    Args:
        waited: since the first look.
        most: the longest pause.
    """
    return min(most, max(LEAST, SHARE * waited))
