"""A llama-server for as long as a `with` lasts, asked over HTTP as any client would."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Sequence

from qlora.cli import UserError
from qlora.prompts import TEMPLATE_VARIABLES

PATIENCE_SECONDS = 600  # a 70B read from a slow disk; a crash is noticed at once
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's ports


class Server:
    """llama-server on `model` with `loras` applied, one request at a time, `context` tokens.

    `load_seconds` is from the start of the process to its first "ready", warm-up included. Raises UserError with
    the server's last words where it does not get that far.
    """

    def __init__(self, binary: Path, model: Path, loras: Sequence[Path] = (), context: int = 1024):
        self.command = [
            str(binary), "-m", str(model), "-c", str(context), "--parallel", "1", "--host", "127.0.0.1", "--offline", "--no-ui",
            "--cache-ram", "0", "--skip-chat-parsing", "--chat-template-kwargs", json.dumps(TEMPLATE_VARIABLES),
            *(["--lora", ",".join(f'"{lora}"' for lora in loras)] if loras else []),  # quoted: a path may hold a comma
        ]

    def __enter__(self) -> "Server":
        self.log = tempfile.TemporaryFile(mode="w+", errors="replace")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "AIP_"))}  # it takes settings and keys from there
        started = time.perf_counter()
        self.process = subprocess.Popen([*self.command, "--port", str(port)], stdout=self.log, stderr=self.log, env=plain)
        try:
            while not self.ready():
                if self.process.poll() is not None or time.perf_counter() - started > PATIENCE_SECONDS:
                    raise UserError(f"llama-server did not start ({self.last_words()})")
                time.sleep(0.02)
        except BaseException:
            self.__exit__()
            raise
        self.load_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def ready(self) -> bool:
        try:
            with DIRECT.open(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200 and self.process.poll() is None  # another program may have taken the port
        except OSError:  # not listening yet, or 503: still loading
            return False

    def post(self, path: str, body: dict) -> dict:
        """The JSON reply to a JSON request; raises UserError with the server's own message where it refuses."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with DIRECT.open(request, timeout=PATIENCE_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise UserError(f"llama-server refused {path}: {error.read().decode(errors='replace')[:300]}") from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"llama-server is gone ({error}; {self.last_words()})") from None

    def last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
        return (errors or lines or ["no output"])[0][:300]

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Token ids that the server makes of a conversation: the file's chat template, then its tokenizer with BOS where it adds one."""
        text = self.post("/apply-template", {"messages": messages})["prompt"]
        return self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def chat(self, messages: list[dict], tokens: int, top: int = 0, to_the_end: bool = False) -> dict:
        """Greedy reply of at most `tokens` tokens: {text, top: [(ids, logprobs) of each position], prompt tokens, timings}.

        `to_the_end` goes on over the end token, for timings. Nothing is reused from earlier requests.
        """
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": to_the_end}
        if top:
            body |= {"logprobs": True, "top_logprobs": top}
        reply = self.post("/v1/chat/completions", body)
        choice = reply["choices"][0]
        positions = (choice.get("logprobs") or {}).get("content") or []
        if top and not positions:  # the likeliest token is half of a character
            raise UserError("llama-server gave no probabilities for the first token; labels have to begin with a whole character")
        return {
            "text": choice["message"]["content"],
            "top": [tuple(zip(*[(t["id"], t["logprob"]) for t in position["top_logprobs"]])) for position in positions],
            "prompt_tokens": reply["usage"]["prompt_tokens"],
            "timings": reply["timings"],
        }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
