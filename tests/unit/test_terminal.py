"""How a command ends when it is told to stop."""

import subprocess
import sys

import pytest

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
