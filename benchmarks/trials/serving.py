"""The server that llama.cpp/serve.sh starts: wrong requests, missing keys, pages of other origins.

It is started once, by the script itself in a copy of its folder, and asked by all workers. After each request
it must still answer a right one; its key may stand in no answer and not in its log.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trials.gguf_model import write_gguf
from trials.schedule import Kind
from trials.verdicts import Verdict
from trials.world import ROOT, System, World, in_a_fork

SERVER = ROOT / "llama.cpp" / "build" / "bin" / "llama-server"
EVIL = "https://evil.example"
SECONDS = 20  # for an answer of a few tokens


@dataclass
class Server:
    port: int
    key: str
    log: Path

    def send(self, raw: bytes, seconds: float = SECONDS) -> bytes:
        """All that comes back on a connection of its own; b"" where it is closed without an answer."""
        got = b""
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", self.port), seconds) as s,
        ):
            with contextlib.suppress(ConnectionError):  # it may stop reading in the middle
                s.sendall(raw)
                s.shutdown(socket.SHUT_WR)
            while piece := s.recv(65536):
                got += piece
        return got

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict | None = None, key: bool = True
    ) -> bytes:
        given = {"Host": f"127.0.0.1:{self.port}", "Connection": "close", "Content-Type": "application/json"}
        given |= {"Authorization": f"Bearer {self.key}"} if key else {}
        given |= {"Content-Length": str(len(body))} | (headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value is not None)
        request = f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape")
        return self.send(request + body)

    def well(self) -> bool:
        """Whether it answers a right request."""
        body = json.dumps({"prompt": "A film", "max_tokens": 2, "temperature": 0}).encode()
        return status(self.ask("POST", "/v1/completions", body)) == 200


def status(answer: bytes) -> int:
    """0 where there is none."""
    words = answer.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def not_built() -> str | None:
    return None if SERVER.exists() else "llama.cpp is not built (llama.cpp/build.sh)"


@contextlib.contextmanager
def running(world: World) -> Iterator[None]:
    """world.server, as long as the block lasts."""
    folder = world.work / "serving"
    program = folder / "llama.cpp" / "build" / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    shutil.copy(ROOT / "llama.cpp" / "serve.sh", folder / "llama.cpp")
    program.write_text(f'#!/bin/sh\nexec {SERVER} "$@" --threads 1\n')
    program.chmod(0o755)
    in_a_fork(lambda: write_gguf(world.work / "tiny", folder / "tiny.gguf"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        folder / "llama.cpp" / "serve.sh",
        "--port",
        str(port),
        "--model",
        "tiny.gguf",
        "--ctx-size",
        "256",
    ]
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(command, cwd=folder, stderr=said, stdout=said, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while "stop " not in (text := (folder / "said").read_text()):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"error: serve.sh did not start: {text[-500:]}")
            time.sleep(0.05)
        key = (folder / "llama.cpp" / "api-key").read_text().strip()
        world.server = Server(port, key, folder / "llama.cpp" / f"server-{port}.log")
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def judged(server: Server, answer: bytes, verdict: Verdict) -> Verdict:
    """What must hold after every request."""
    if server.key.encode() in answer:
        return Verdict("secret shown", "the key is in the answer")
    if server.key in server.log.read_text(errors="replace"):
        return Verdict("secret shown", "the key is in the log")
    try:
        return verdict if server.well() else Verdict("other", "it no longer answers a right request")
    except TimeoutError:
        return Verdict("hang", "it no longer answers a right request in time")


# --- wrong requests ---

PATHS = (
    "/v1/completions",
    "/completion",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/v1/embeddings",
)
PATHS += ("/infill", "/apply-template", "/lora-adapters", "/rerank", "/v1/messages", "/v1/responses")
BODIES = (
    *(
        "",
        "{",
        "[]",
        "null",
        "1",
        '"x"',
        "{}",
        "[" * 20000,
        '{"prompt":' * 2000,
        "\x00",
        "\ufeff{}",
        "<xml/>",
        "a=b",
    ),
    *('{"prompt": null}', '{"prompt": 1}', '{"prompt": [1, "a", null]}', '{"prompt": [-1, 999999999]}'),
    *(
        '{"prompt": "a", "max_tokens": -5}',
        '{"prompt": "a", "max_tokens": 1e300}',
        '{"prompt": "a", "n": 100000}',
    ),
    *('{"prompt": "a", "temperature": "x"}', '{"prompt": "a", "top_k": -99999999999999999999}'),
    '{"prompt": "a", "max_tokens": 2, "stop": [""]}',
    '{"prompt": "a", "max_tokens": 2, "logit_bias": [[1e9, 5], "x"]}',
    '{"prompt": "a", "max_tokens": 2, "grammar": "root ::= root"}',
    '{"prompt": "a", "max_tokens": 2, "grammar": "root ::= "}',
    '{"prompt": "a", "max_tokens": 2, "json_schema": {"$ref": "#"}}',
    '{"prompt": "a", "max_tokens": 2, "json_schema": {"$ref": "file:///etc/passwd"}}',
    '{"prompt": "a", "max_tokens": 2, "json_schema": {"pattern": "((((a*)*)*)*)*$"}}',
    '{"prompt": "a", "max_tokens": 2, "n_probs": 99999999}',
    '{"prompt": "a", "max_tokens": 2, "samplers": ["x", 5]}',
    '{"prompt": "a", "max_tokens": 2, "lora": [{"id": -1, "scale": "x"}]}',
    '{"prompt": "a", "max_tokens": 2, "id_slot": 99}',
    '{"messages": "x"}',
    '{"messages": [{"role": ["user"], "content": {}}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}]}',
    '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "tools": "x"}',
    '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": "{{ 1 }}"}}',
    '{"messages": [{"role": "user", "content": "a"}], "chat_template": "{% for i in range(99999999) %}"}',
    '{"content": ["a", 5]}',
    '{"tokens": ["a", 1e99]}',
    '{"input_prefix": 5, "input_suffix": []}',
)
RAW = (
    *(
        b"",
        b"\r\n\r\n",
        b"\x00" * 5000,
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"x" * 100000,
    ),
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
    b"POST /completion HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /completion HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\nx",
    b"POST /completion HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /completion HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nx",
    b"POST /completion HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"
    b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nAuthorization: Bearer " + b"a" * 50000 + b"\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
)
TRAVERSAL = (
    "/../../etc/passwd",
    "/..%2f..%2fetc/passwd",
    "//etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/./api-key",
)
TRAVERSAL += (
    "/index.html",
    "/llama.cpp/api-key",
    "/v1/../api-key",
    "/slots/0?action=save",
    "/props",
    "/metrics",
)
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE", "CONNECT", "get", "🎬")


def plan_wrong(_world: World, draw: random.Random) -> list[dict]:
    trials = [{"body": i, "path": path} for i in range(len(BODIES)) for path in draw.sample(PATHS, 3)]
    trials += [{"raw": i} for i in range(len(RAW))]
    trials += [{"method": method, "path": path} for method in METHODS for path in draw.sample(PATHS, 3)]
    trials += [{"method": "GET", "path": path} for path in TRAVERSAL]
    trials += [{"huge": n, "path": "/v1/completions"} for n in (10**5, 10**6, 10**7)]
    return trials


def ask_wrong(world: World, _system: System, trial: dict) -> Verdict:
    server = world.server
    try:
        if "raw" in trial:
            answer = server.send(RAW[trial["raw"]])
        elif "huge" in trial:
            answer = server.ask("POST", trial["path"], json.dumps({"prompt": "a " * trial["huge"]}).encode())
        elif "body" in trial:
            body = BODIES[trial["body"]].encode("utf-8", "surrogatepass")
            answer = server.ask("POST", trial["path"], body)
        else:
            answer = server.ask(trial["method"], trial["path"])
    except TimeoutError:
        return Verdict("hang", f"no answer in {SECONDS} s")
    if b"root:" in answer:
        return Verdict("secret shown", "a file of the machine")
    return judged(server, answer, Verdict(detail=str(status(answer))))


# --- who may ask ---

KEYS = (
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer x",
    "Bearer null",
    "Basic dXNlcjpwYXNz",
    "half",
    "longer",
    "case",
    "list",
)
ALL = (
    *PATHS,
    "/v1/models",
    "/models",
    "/props",
    "/slots",
    "/metrics",
    "/",
    "/index.html",
    "/api/show",
    "/api/tags",
)


def plan_strangers(_world: World, draw: random.Random) -> list[dict]:
    trials = [
        {"key": key, "method": m, "path": p}
        for p in ALL
        for m in ("GET", "POST")
        for key in draw.sample(KEYS, 4)
    ]
    origins = (
        EVIL,
        "null",
        "http://127.0.0.1:1",
        "http://localhost",
        "file://",
        "http://127.0.0.1.evil.example",
    )
    trials += [{"origin": o, "method": m, "path": p} for o in origins for m in ("OPTIONS", "GET", "POST")
               for p in draw.sample(ALL, 3)]  # fmt: skip
    return trials


def ask_as_stranger(world: World, _system: System, trial: dict) -> Verdict:
    server, body = world.server, b'{"prompt": "a", "max_tokens": 1}'
    if "origin" in trial:
        wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        headers = {"Origin": trial["origin"]} | (wish if trial["method"] == "OPTIONS" else {})
        answer = server.ask(trial["method"], trial["path"], body, headers)
        head = answer.split(b"\r\n\r\n")[0].decode("latin-1").lower()
        given = [line.split(":", 1)[1].strip() for line in head.splitlines() if "-allow-origin:" in line]
        if {"*", trial["origin"].lower()} & set(given) or "allow-credentials: true" in head:
            return Verdict("secret shown", f"{trial['origin']} may read the answers: {given}")
        return judged(server, answer, Verdict(detail=str(status(answer))))
    made = {
        "half": f"Bearer {server.key[:32]}",
        "longer": f"Bearer {server.key}0",
        "list": f"Bearer x, {server.key}",
    }
    made["case"] = f"Bearer {server.key.upper()}"
    key = made.get(trial["key"], trial["key"])
    answer = server.ask(trial["method"], trial["path"], body, {"Authorization": key}, key=False)
    if status(answer) in (200, 500):
        return Verdict(
            "secret shown", f"answered without the key: {status(answer)} {trial['method']} {trial['path']}"
        )
    return judged(server, answer, Verdict(detail=str(status(answer))))


KINDS = (
    Kind(
        "wrong requests to the server",
        "broken JSON and HTTP, wrong types, huge bodies, paths outside; then it still answers a right one",
        plan_wrong,
        ask_wrong,
        skip=not_built,
        setup=running,
    ),
    Kind(
        "strangers at the server",
        "no key, wrong keys, pages of other origins, on every path: no answer and no permission",
        plan_strangers,
        ask_as_stranger,
        skip=not_built,
        setup=running,
    ),
)
