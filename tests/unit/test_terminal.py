"""How a command ends when it is told to stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SWALLOWED = """
import gc, os, signal, sys, time, weakref
from flows.terminal import Terminated, catch_stops

class Thing:
    pass

def stop(_):
    os.kill(os.getpid(), int(sys.argv[1]))  # while the collector runs: what the handler raises is swallowed

catch_stops()
thing = Thing()
thing.itself = thing
seen = weakref.ref(thing, stop)
del thing
try:
    gc.collect()
    time.sleep(20)
    print("went on")
except KeyboardInterrupt as stopped:
    print(type(stopped).__name__)
"""


@pytest.mark.parametrize(("number", "name"), [(15, "Terminated"), (2, "KeyboardInterrupt")])
def test_a_stop_in_the_collector_is_not_lost(number: int, name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SWALLOWED, str(number)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == name
    assert "ignored" not in ended.stderr


@pytest.mark.parametrize("home", ["/proc", "/dev/null/home"])
def test_prefect_has_a_home_where_the_users_own_cannot_be_written(home: str) -> None:
    code = "import flows, os; print(os.environ.get('PREFECT_HOME', ''), os.path.isdir(os.environ['PREFECT_HOME']))"
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_HOME"} | {"HOME": home}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment, cwd=CHECKOUT)
    place, there = ended.stdout.split()
    assert "potstill-prefect-" in place
    assert there == "True"
    assert not Path(place).exists(), "it goes with the process"
