"""How a command ends when it is told to stop, wherever the signal finds it."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
# What a command does when it is stopped; `stop()` sends the signal.
BODIES = {
    "waits": "stop(); time.sleep(20)",
    "swallowed by the collector": """
        class Thing: pass
        thing = Thing()
        thing.itself = thing
        seen = weakref.ref(thing, lambda _: stop())  # what the handler raises here is swallowed
        del thing
        gc.collect()
        time.sleep(20)
    """,
    "makes another error of it": """
        try: stop(); time.sleep(20)
        except BaseException: raise ImportError("half a module")
    """,
    "ends with a message of its own": """
        try: stop(); time.sleep(20)
        except BaseException: ending.end("no such model", 2)
    """,
    "told again and again": """
        try: stop(); time.sleep(20)
        finally:
            for _ in range(9): stop(); time.sleep(0.01)
    """,
    "does not let go": """
        while True:
            try: stop(); time.sleep(20)
            except BaseException: pass
    """,
    "in a library in C": "stop_soon(); hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)",
    "at exit": "atexit.register(lambda: (stop(), time.sleep(20))); print = str",
    "at exit, told before": "atexit.register(time.sleep, 20); stop_soon(); time.sleep(20)",
}
COMMAND = """
import atexit, gc, hashlib, os, sys, threading, time, weakref
from flows import ending

ending.PATIENCE = 0.5
stop = lambda: os.kill(os.getpid(), int(sys.argv[1]))
stop_soon = lambda: threading.Timer(0.2, stop).start()
with ending.ending():
    {body}
    print("went on")
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=CHECKOUT)


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize(("body", "number"), [("waits", signal.SIGHUP), *zip(BODIES, itertools.cycle(STOPS))])
def test_a_stop_ends_a_command_with_one_line(body: str, number: int) -> None:
    ended = run(COMMAND.replace("{body}", BODIES[body].replace("\n    ", "\n").strip()), number, "a b")
    assert ended.returncode == 128 + number
    assert ended.stderr == f"potstill: stopped; `potstill {number} 'a b'` starts again\n"
    assert ended.stdout == ""


@pytest.mark.parametrize("swallowed", ["except BaseException: pass", "finally: continue"])
def test_a_stop_that_is_swallowed_is_raised_again(swallowed: str) -> None:
    """Long before the command would be ended whatever it does."""
    body = f"""
    for _ in range(1):
        try: stop(); time.sleep(20)
        {swallowed}
    time.sleep(20)
    """
    ended = run(COMMAND.replace("{body}", body.strip()).replace("PATIENCE = 0.5", "PATIENCE = 30"), 15)
    assert (ended.returncode, ended.stdout) == (128 + 15, "")
    assert ended.stderr == "potstill: stopped; `potstill 15` starts again\n"


def test_what_a_stop_breaks_in_a_flow_is_a_stop() -> None:
    """Prefect calls a flow run crashed that ends in one, and failed what ends in any other exception."""
    body = """
    try:
        with ending.stoppable():
            try: stop(); time.sleep(20)
            except BaseException: raise ValueError("Task run is not set")
    except ending.Told: print("told"); raise
    """
    ended = run(COMMAND.replace("{body}", body.strip()), 15)
    assert (ended.returncode, ended.stdout) == (128 + 15, "told\n")


@pytest.mark.parametrize("nested", [False, True])
def test_a_stop_waits_for_the_flow_to_begin(nested: bool) -> None:
    """Prefect would leave a flow run pending that is stopped while it is made."""
    body = f"""
    def flow():
        with ending.starting():
            stop(); time.sleep(0.1); print("made")
            with ending.stoppable(): print("begun")
    if {nested}:
        with ending.starting():
            with ending.stoppable(): flow()
    flow()
    """
    ended = run(COMMAND.replace("{body}", body.strip()), 15)
    assert (ended.returncode, ended.stdout) == (128 + 15, "made\n")


# The entry point, which says when it is ready for a stop; before that Python starts, and ends as Python does.
BEGINS = """
import sys
from flows import cli, stops
def on_stops(handler):
    stops.on_stops(handler)
    print("begins", flush=True)
cli.on_stops = on_stops
sys.argv = ["potstill", "recipe", "--out", "/dev/null/r.toml"]
cli.main()
"""


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_while_the_command_is_imported(number: int) -> None:
    """One line, whatever Python was doing: real processes, stopped from their first line on until they have ended."""
    early = 0
    for milliseconds in (0, 20, 50, 100, 200, 400, 700, 1000):
        command = subprocess.Popen(
            [sys.executable, "-c", BEGINS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT
        )
        assert command.stdout is not None
        command.stdout.readline()
        time.sleep(milliseconds / 1000)
        command.send_signal(number)
        out, err = command.communicate(timeout=60)
        if command.returncode == 2:  # it had ended
            continue
        assert (command.returncode, out) == (128 + number, "")
        assert re.fullmatch(r"potstill: stopped(?: before it began; the same command|; `potstill .*`) starts again\n", err), err
        early += "before it began" in err
    assert early


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As `nohup` does it."""
    code = COMMAND.replace("{body}", "stop(); time.sleep(0.1)")
    ended = run(f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}", int(signal.SIGHUP))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


def test_a_stop_says_what_is_committed() -> None:
    """Of the run in hand: a teacher's that is made first, then the run's own."""
    body = """
    from pathlib import Path
    from configs.load import load_recipe
    recipe = load_recipe(Path("tests/recipes/tiny.toml"), ("root=/nowhere",))
    with ending.stoppable(recipe, 3):
        with ending.stoppable(recipe.model_copy(update={"name": "teacher"}), 1): pass
        stop(); time.sleep(20)
    """
    for code, where in ((body, "3 of tiny"), (body.replace("pass", "stop(); time.sleep(20)"), "1 of teacher")):
        ended = run(COMMAND.replace("{body}", code.strip()).replace("PATIENCE = 0.5", "PATIENCE = 30"), 15)
        assert ended.stderr == f"potstill: stopped in round 1 of {where}; committed of it: nothing; `potstill 15` goes on\n"


@pytest.mark.parametrize(("body", "status"), [("pass", 0), ("sys.exit(1)", 1), ("ending.end('why', 2)", 2), ("1 / 0", 1)])
def test_other_ends_keep_their_status(body: str, status: int) -> None:
    ended = run(COMMAND.replace("{body}", body))
    assert ended.returncode == status
    assert ("ZeroDivisionError" in ended.stderr) == ("1 / 0" in body)


NO_ENTRY = """
import pwd

def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = getpwuid
"""
HOMELESS = """
    import prefect
    print(os.path.expanduser("~"), prefect.settings.PREFECT_HOME.value())
    sys.exit(0)
"""


@pytest.mark.parametrize("home", ["/proc", "/dev/null/home", None])
def test_prefect_has_a_home_where_the_user_has_none(home: str | None) -> None:
    """One that cannot be written, or none at all: no HOME and no entry among the users, as in a container."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PREFECT_HOME", "HOME", "USER", "LOGNAME")}
    environment |= {"HOME": home} if home else {}
    code = ("" if home else NO_ENTRY) + COMMAND.replace("{body}", HOMELESS.strip())
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=CHECKOUT)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    user, place = ended.stdout.split()
    assert "potstill-home-" in place
    assert user == home or "potstill-home-" in user
    assert not Path(place).exists(), "it goes with the process"
    assert home or not Path(user).exists()
