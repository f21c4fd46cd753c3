"""The process of a resident trainer; `hand_over.start` starts it and writes what it needs to its standard input.

Before it imports anything it takes over the module path of the process that started it, so that both run the same code.
"""

import json
import sys


def main() -> None:
    start = json.loads(sys.stdin.buffer.read())
    sys.path[:] = start.pop("path")
    from lalora_flwr.site.resident.life import live

    live(**start)


if __name__ == "__main__":
    main()
