"""Just enough of Curve25519 to write another key that X25519 takes for a given one; for attacks, slow, on public values only."""

from __future__ import annotations

PRIME, A = 2**255 - 19, 486662
ORDER_8 = 325606250916557431795983626356110631294008115727848805560023387167927233504  # u of a point of order 8 (RFC 7748's list)
Point = tuple[int, int] | None


def inverse(a: int) -> int:
    return pow(a, PRIME - 2, PRIME)


def on_curve(u: int) -> tuple[int, int]:
    """A point with this u, of y² = u³ + A u² + u."""
    square = (u**3 + A * u * u + u) % PRIME
    root = pow(square, (PRIME + 3) // 8, PRIME)
    if root * root % PRIME != square:
        root = root * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    assert root * root % PRIME == square
    return u, root


def add(p: Point, q: Point) -> Point:
    if p is None or q is None:
        return p or q
    (x1, y1), (x2, y2) = p, q
    if x1 == x2 and (y1 + y2) % PRIME == 0:
        return None
    slope = (3 * x1 * x1 + 2 * A * x1 + 1) * inverse(2 * y1) if x1 == x2 else (y2 - y1) * inverse(x2 - x1)
    x3 = (slope * slope - A - x1 - x2) % PRIME
    return x3, (slope * (x1 - x3) - y1) % PRIME


def aliases(key: bytes) -> list[bytes]:
    """Seven other keys with which everybody has the secret that they have with this one: it plus each point of small order."""
    own = on_curve(int.from_bytes(key, "little") % 2**255)
    small: Point = on_curve(ORDER_8)
    found, torsion = [], small
    while torsion is not None:
        point = add(own, torsion)
        assert point is not None
        found.append(point[0].to_bytes(32, "little"))
        torsion = add(torsion, small)
    return found
