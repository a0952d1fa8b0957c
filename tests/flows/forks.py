"""Runs `potstill` many times: everything is imported once, each command is a fork with its own output and exit status.

Reads one JSON list a line, `[arguments, folder, file for output, file for errors]`; answers with the fork's process id
when it starts and with its exit status when it has ended.
"""

import atexit
import importlib
import json
import os
import sys
import traceback

from flows.cli import main

for module in ("flows.distill", "tasks.inspect", "reasoning_gym", "transformers.models.llama"):
    importlib.import_module(module)


def command(arguments: list[str], folder: str, out: str, err: str) -> int:
    """What a shell does before it starts a program; the program's entry point; its exit status."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(folder)
    sys.argv = ["potstill", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    if (child := os.fork()) == 0:
        status = command(*json.loads(line))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without taking the interpreter down piece by piece, which takes 2 s
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
