"""The temporary Prefect server of a command, where Prefect is configured with none.

It starts beside the command's own imports and checks, and ends with the command. Prefect would start the same server at the
first flow run and wait for it there, in the command's process group, where Ctrl-C reaches it before the flow has ended.
"""

import atexit
import os
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from configs.errors import Unavailable
from flows.ending import give_up
from tasks.running.attached import end_attached, start_attached

PATIENCE = 120.0  # seconds until it answers
ANSWER = 60.0  # seconds in which one that is there does, also on a busy machine
LAST_WORDS = 5  # lines of its output that an error quotes
# What Prefect sets for its own temporary server, and services that one command has no use for: they write each event of
# a run into the database, and look for automations that it may start. The recorder of task runs stays.
LIGHT = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}


def expect_answer(url: str) -> None:
    """Raise Unavailable where nothing answers at the address of a server that Prefect is configured with."""
    try:
        urlopen(f"{url}/health", timeout=ANSWER).close()
    except HTTPError:  # it answers; Prefect itself knows how to ask
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # Prefect has settings for those
            raise Unavailable(
                f"no Prefect server answers at {url} ({reason}), which PREFECT_API_URL or a profile of Prefect names; start it "
                "again, as `potstill up` does, or unset PREFECT_API_URL: a command then has a temporary one"
            ) from None


def start_server() -> Callable[[], None]:
    """Start a server unless Prefect is configured with one. Returns the function that waits until it answers.

    That, and here a configured one that is not there, raises Unavailable.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    if url := get_current_settings().api.url:
        expect_answer(url)
        return lambda: None
    with socket.create_server(("127.0.0.1", 0)) as listener:  # who connects before the server is there waits for it
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        log = tempfile.TemporaryFile()  # noqa: SIM115
        server = start_attached(
            "uvicorn",
            *("--factory", "prefect.server.api.server:create_app"),
            *("--fd", str(listener.fileno()), "--log-level", "error", "--lifespan", "on"),
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=LIGHT | os.environ | {"PREFECT_SERVER_LOGGING_LEVEL": "ERROR"},  # into the file
        )
    ended = threading.Event()

    def end() -> None:
        ended.set()
        end_attached(server)

    atexit.register(end)
    os.environ["PREFECT_API_URL"] = address
    os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")  # the log is here; what cannot be sent would be told of
    refresh_global_settings_context()

    def wait() -> None:
        try:
            urlopen(f"{address}/health", timeout=PATIENCE).close()
        except (URLError, OSError):
            log.seek(0)
            words = log.read().decode(errors="replace").strip().splitlines()[-LAST_WORDS:]
            raise Unavailable(
                "Prefect's temporary server did not start; its last output:\n  " + ("\n  ".join(words) or "(none)")
            ) from None
        threading.Thread(target=watch, daemon=True).start()

    def watch() -> None:
        status = server.wait()
        if not ended.is_set():  # the flow would wait for it for minutes
            give_up(f"Prefect's temporary server ended by itself (status {status})")

    return wait
