"""The command line as a fixture of all tests in this folder."""

from tests.cli.commands import lalora  # noqa: F401
