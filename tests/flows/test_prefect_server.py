"""A Prefect server that a user has named, and that is not there any more: as where `potstill up` has ended since."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from configs.errors import Unavailable
from flows.server import start_server
from flows.up import bring_up


class Shut(BaseHTTPRequestHandler):
    """What answers, but not so to one who has no key."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shut() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Shut)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("start", [start_server, lambda: bring_up(print)])
def test_one_that_is_gone_is_named(start):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(Unavailable) as caught:
        start()
    for part in (f"no Prefect server answers at {url}", "refused", "`potstill up`", "unset PREFECT_API_URL"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_that_asks_for_a_key_is_left_to_prefect(shut):
    with temporary_settings({PREFECT_API_URL: shut}):
        start_server()()
