"""The ``lalora`` command."""
