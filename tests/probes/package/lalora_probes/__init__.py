"""Toy extensions of lalora-flwr, none of which needs a change in it."""
