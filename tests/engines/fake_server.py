"""What this project uses of vLLM's HTTP interface, over a real model and real sockets, with faults on demand."""

import json
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class FakeServer:
    """Serves the model folder `path` as `name`. `faults` are used up one a request to /v1/completions:

    a status to answer with, "reset" (half an answer), "garbage", seconds to wait, or None for none.
    """

    def __init__(self, path: str, name: str | None = None, processed: bool = True, max_logprobs: int = 400, port: int = 0):
        self.path, self.name, self.processed, self.max_logprobs = path, name or path, processed, max_logprobs
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.faults: deque[Any] = deque()
        self.requests: list[dict[str, Any]] = []  # to /v1/completions
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"fake": self}))
        self.lock, self.stopped = threading.Lock(), False
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self) -> None:
        self.stopped = True
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": self.name, "root": self.path, "parent": None, "max_model_len": 64}]}
        assert body is not None
        if body["model"] != self.name:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
            return {"tokens": ids, "count": len(ids), "max_model_len": 64}
        assert path == "/v1/completions", path
        prompts = body["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        return {"choices": [self.choice(i, prompt, body) for i, prompt in enumerate(prompts)][::-1]}  # order is no promise

    def choice(self, index: int, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        k, count = body.get("prompt_logprobs"), body.get("max_tokens", 16)
        if k is not None and k > self.max_logprobs:
            raise Refused(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}")
        if count < 1:
            raise Refused(400, "max_tokens must be at least 1")
        choice: dict[str, Any] = {"index": index, "text": "", "prompt_logprobs": None}
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = prompt
        if k is not None:
            rows = self.logprobs(prompt)[:-1]
            choice["prompt_logprobs"] = [None, *(entries(row, actual, k) for row, actual in zip(rows, prompt[1:]))]
        ids, chosen, tops = self.sample(prompt, count, body)
        choice["token_ids"] = ids
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": chosen, "top_logprobs": tops}
        return choice

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def sample(self, prompt: list[int], count: int, body: dict[str, Any]) -> tuple[list[int], list[float], list[dict]]:
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        stops = body.get("stop_token_ids") or []
        asked = body.get("logprob_token_ids") or []
        if asked and len(asked) != body["logprobs"]:
            raise Refused(400, "logprobs must equal len(logprob_token_ids)")
        ids: list[int] = []
        chosen: list[float] = []
        tops: list[dict] = []
        while len(ids) < count and not (ids and ids[-1] in stops):
            raw = self.logprobs(prompt + ids)[-1]
            law = raw.clone()
            for i, bias in (body.get("logit_bias") or {}).items():
                law[int(i)] += bias
            if body["temperature"]:
                law = law / body["temperature"]
                if body.get("top_k"):
                    law[law < law.topk(body["top_k"]).values[-1]] = -torch.inf
                if body.get("top_p", 1) < 1:
                    p, order = law.softmax(-1).sort(descending=True)
                    law[order[p.cumsum(0) - p >= body["top_p"]]] = -torch.inf
            law = law.log_softmax(-1)
            drawn = torch.multinomial(law.exp(), 1, generator=generator) if body["temperature"] else law.argmax()
            given = law if self.processed else raw
            ids.append(int(drawn))
            chosen.append(float(given[ids[-1]]))
            tops.append({f"token_id:{i}": float(given[i]) for i in asked})
        return ids, chosen, tops


def entries(row: torch.Tensor, actual: int, k: int) -> dict[str, dict[str, Any]]:
    """One position of `prompt_logprobs`: the actual token and the k likeliest, by id."""
    ids = [actual, *(row.topk(k).indices.tolist() if k else [])]
    return {str(i): {"logprob": float(row[i]), "rank": int((row > row[i]).sum()) + 1, "decoded_token": ""} for i in ids}


class Refused(Exception):
    """A status of 4xx with its reason."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def do_GET(self) -> None:
        self.respond(None)

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body: dict[str, Any] | None) -> None:
        if self.fake.stopped:
            self.close_connection = True
            return
        fault = None
        if self.path == "/v1/completions":
            with self.fake.lock:
                self.fake.requests.append(body or {})
                fault = self.fake.faults.popleft() if self.fake.faults else None
        if isinstance(fault, float):
            time.sleep(fault)
        status, data = 200, {}
        if isinstance(fault, int):
            status, data = fault, {"error": {"message": "a fault on demand"}}
        else:
            try:
                data = self.fake.answer(self.path, body)
            except Refused as refused:
                status, data = refused.args[0], {"error": {"message": refused.args[1]}}
        payload = b"<html>" if fault == "garbage" else json.dumps(data).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload[: len(payload) // 2] if fault == "reset" else payload)
        except OSError:
            return  # the client is gone
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
