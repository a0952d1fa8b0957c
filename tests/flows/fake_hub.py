"""What this project uses of the Hugging Face Hub's HTTP interface, on the loopback: it keeps what arrives."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories by name, with the files of their last commit. `refusal` is (status, words) for every request to come."""

    def __init__(self, token: str):
        self.token, self.refusal = token, None
        self.repos: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}  # large files, by SHA-256
        self.asked: list[str] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, data: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            new = name not in self.repos
            self.repos.setdefault(name, {"asked": asked, "files": {}, "commits": []})
            return (200 if new else 409), {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(data)["files"]
            ]
            return 200, {"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]}
        if path.endswith("/info/lfs/objects/batch"):
            upload = [
                thing | {"actions": {"upload": {"href": f"{self.url}/store/{thing['oid']}"}}}
                for thing in json.loads(data)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": upload}
        if path.startswith("/store/"):
            assert hashlib.sha256(data).hexdigest() == path.removeprefix("/store/")
            self.stored[path.removeprefix("/store/")] = data
            return 200, {}
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        assert path == f"/api/models/{name}/commit/main", path
        repo = self.repos[name]
        for entry in map(json.loads, data.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                repo["commits"].append(value["summary"])
            elif entry["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                repo["files"][value["path"]] = self.stored[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "pullRequestUrl": None}


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def handle_any(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        known = path.startswith("/store/") or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.refusal is not None:
            status, body = self.hub.refusal[0], {"error": self.hub.refusal[1]}
        elif not known:
            status, body = 401, {"error": "Invalid credentials in Authorization header"}
        else:
            status, body = self.hub.answer(path, data)
        answer = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        if "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, *_: Any) -> None:
        pass
