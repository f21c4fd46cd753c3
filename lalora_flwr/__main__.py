"""``python -m lalora_flwr``: the ``lalora`` command."""

from lalora_flwr.cli.main import main

if __name__ == "__main__":
    main()
