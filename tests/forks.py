"""Commands in forks of one process that has imported everything: a tenth of a second each, in place of seven.

Run as a script this is that process: it reads one JSON object a line. `start` makes a fork with its own arguments, folder and
output, and is answered with its process id; `wait` is answered with the exit status of a process id.
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
MODULES = ("flows.distill", "tasks.views.inspect", "reasoning_gym", "transformers.models.llama")


class Forks:
    """The other end: starts the process, and commands in it, as many at a time as asked for."""

    def __init__(self, server: str):
        self.server = server
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # tests/ray is not Ray
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            env={**os.environ, "PREFECT_API_URL": server, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def start(self, arguments: Iterable[object], folder: Path, out: Path, err: Path, patient: bool = True) -> int:
        """Start `potstill` with these arguments, or Python where the first of them is `-c`; its process id.

        Unless it is `patient`, stages that fail are tried again at once.
        """
        told = [str(arg) for arg in arguments]
        return self._ask(start=told, folder=str(folder), out=str(out), err=str(err), patient=patient)

    def wait(self, pid: int) -> int:
        """The exit status of what was started; negative where a signal ended it."""
        return self._ask(wait=pid)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(30) == 0

    def _ask(self, **request: Any) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def retried() -> list[Any]:
    """The stages that are tried again, seconds later, when their engine fails."""
    from tasks.completions import complete_shard
    from tasks.evaluate import evaluate_model
    from tasks.rollout import roll_out
    from tasks.score import score_shard

    return [complete_shard, evaluate_model, roll_out, score_shard]


def command(arguments: list[str], folder: str, out: str, err: str, patient: bool) -> int:
    """What a shell does before it starts a program; the program's entry point; its exit status."""
    for number, path in enumerate((os.devnull, out, err)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.setpgid(0, 0)  # a group of its own, to be signalled as a whole
    os.chdir(folder)
    for stage in [] if patient else retried():
        stage.retry_delay_seconds = 0
    try:
        if arguments[:1] == ["-c"]:
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = ["potstill", *arguments]
            from flows.cli import main as potstill

            potstill()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    importlib.import_module("flows.cli")
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        elif (child := os.fork()) == 0:
            status = command(request.pop("start"), **request)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # without taking the interpreter down piece by piece, which takes 2 s
        else:
            print(child, flush=True)


if __name__ == "__main__":
    main()
