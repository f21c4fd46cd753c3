"""A site's helper processes end at once when the process that started them ends, however that one ends (Linux).

A SuperNode starts `flower-superexec`, which starts `flwr-clientapp` for each message. Of a killed SuperNode they notice the
end by looking, then try to say good-bye to it and fail: a ClientApp trains on for 11 to 19 seconds. So the SuperNode finds
both commands in a folder of its own, where each is a script that asks the kernel for SIGKILL at its parent's end and then
becomes the real command, or for `flwr-clientapp` a shorter one (`clientapp.py`). This file is that script's body: it needs the
standard library only, and starts in some 20 ms.
"""

import ctypes
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("flower-superexec", "flwr-clientapp")
SHORTER = {"flwr-clientapp": Path(__file__).with_name("clientapp.py")}  # what takes the real command's place, given its path
_PR_SET_PDEATHSIG = 1


def make_scripts(folder: Path, interpreter: str = sys.executable, shorter: Mapping[str, Path] = SHORTER) -> None:
    """Write the scripts into ``folder``, which then has to come first in PATH; ``interpreter`` runs them.

    Args:
        shorter: Python files that run in place of commands, with the path of the real one before its arguments.

    Raises:
        FileNotFoundError: if one of the commands is neither in PATH nor beside the interpreter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        script = folder / program
        others = [place for place in os.get_exec_path() if Path(place) != folder]
        if (real := shutil.which(program, path=os.pathsep.join([*others, os.path.dirname(interpreter)]))) is None:
            raise FileNotFoundError(f"{program} is not in PATH")
        instead = [interpreter, "-P", str(shorter[program])] if program in shorter else []
        command = shlex.join([interpreter, "-IS", __file__, *instead, os.path.abspath(real)])
        new = script.with_name(f"{program}.new")
        new.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        new.chmod(0o755)
        new.replace(script)


def main() -> None:
    """Become the command that the arguments give, with the parent's end as its own."""
    program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if "--parent-pid" in arguments and os.getppid() != int(arguments[arguments.index("--parent-pid") + 1]):
            sys.exit(1)  # the parent ended before the kernel knew of it
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
