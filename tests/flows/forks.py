"""Runs `potstill` many times: everything is imported once, each command is a fork with its own output and exit status.

Reads one JSON list a line, `[arguments, folder, file for output, file for errors]`; answers with the exit status.
"""

import importlib
import json
import os
import sys

from flows.cli import main

for module in ("flows.distill", "tasks.inspect", "reasoning_gym", "transformers.models.llama"):
    importlib.import_module(module)


def command(arguments: list[str], folder: str, out: str, err: str) -> None:
    """What a shell does before it starts a program; then the program's entry point."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(folder)
    sys.argv = ["potstill", *arguments]
    main()


for line in sys.stdin:
    if (child := os.fork()) == 0:
        command(*json.loads(line))
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
