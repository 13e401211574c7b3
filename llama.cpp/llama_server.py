"""The same questions, asked of GGUF files through a llama-server, over HTTP.

Prompts are sent as token ids: the server parses control tokens in the text of a message, so a review that
holds "<|im_end|>" would end its own turn (llama.cpp#26273).
"""

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ladder import SPEED, Replies
from qlora.cli import UserError, progress
from qlora.control_tokens import TEMPLATE_VARIABLES, has_control_tokens
from qlora.prompts import render
from reference import Questions
from settings import BIN, SURVIVAL_ROWS

TOP = 1000  # likeliest next tokens that a server is asked for; the rest of the vocabulary counts as one
PATIENCE_SECONDS = 600  # a 70B read from a slow disk; a crash is noticed at once


def ask_server(name: str, files: Sequence[Path], questions: Questions) -> Replies:
    """Replies of a model file with LoRA files on it; raises UserError if the server fails."""
    rows, free_next, free = [], [], []
    bar = progress(len(questions.reviews) + len(questions.free), name)
    with Server(files[0], files[1:], questions.context) as server, bar as step:
        for messages in questions.reviews:
            rows.append(server.answer(prompt_ids(server, questions, messages), 1, TOP))
            step(1)
        for messages in questions.free:
            ids = prompt_ids(server, questions, messages)
            free_next.append(server.answer(ids, 1, TOP)["top"])
            free.append(server.answer(ids, questions.free_tokens))
            step(1)
    read, written = ([reply["timings"] for reply in replies] for replies in (rows, free))
    prefill = sum(t["prompt_n"] for t in read) / sum(t["prompt_ms"] for t in read)
    decode = sum(t["predicted_n"] - 1 for t in written) / sum(t["predicted_ms"] for t in written)
    speed = dict(zip(SPEED, (server.load_seconds, 1000 * prefill, 1000 * decode)))
    prompts, texts = [reply["prompt"] for reply in rows + free], [reply["text"] for reply in free]
    odds = np.array([log_odds(*row["top"], questions.answer_ids) for row in rows])
    return Replies(prompts, odds, [row["top"] for row in rows], free_next, texts, speed)


def ask_labels(name: str, model: Path, questions: Questions) -> np.ndarray:
    """Log-odds of the labels of the first SURVIVAL_ROWS reviews (rows,), and nothing else."""
    asked = questions.reviews[:SURVIVAL_ROWS]
    odds = []
    with Server(model, (), questions.context) as server, progress(len(asked), name) as step:
        for messages in asked:
            top = server.answer(prompt_ids(server, questions, messages), 1, TOP)["top"]
            odds.append(log_odds(*top, questions.answer_ids))
            step(1)
    return np.array(odds)


def log_odds(ids: Sequence[int], logprobs: Sequence[float], answer_ids: tuple[int, int]) -> float:
    """log P(second answer) - log P(first): what is not listed counts as the least likely that is."""
    found, least = dict(zip(ids, logprobs)), min(logprobs)
    no, yes = (found.get(token, least) for token in answer_ids)
    return yes - no


def prompt_ids(server: "Server", questions: Questions, messages: list[dict]) -> list[int]:
    """By the file's own template and tokenizer, which the ladder compares with training's.

    Where a message holds a control token by ours, since the server would obey it.
    """
    if has_control_tokens(questions.tokenizer, messages):
        return render(questions.tokenizer, messages, True)
    return server.prompt_ids(messages)


class Server:
    """llama-server on `model` with `loras` applied, one request at a time, `context` tokens.

    `load_seconds` is the time from the start of the process until it is ready, warm-up included. Raises
    UserError with the server's own words if it does not get that far.
    """

    def __init__(self, model: Path, loras: Sequence[Path] = (), context: int = 1024):
        self.command = [str(BIN / "llama-server"), "-m", str(model), "-c", str(context), "--parallel", "1"]
        self.command += ["--host", "127.0.0.1", "--offline", "--no-ui", "--cache-ram", "0"]
        self.command += ["--chat-template-kwargs", json.dumps(TEMPLATE_VARIABLES), "--reasoning", "off"]
        if loras:  # quoted: a path may hold a comma
            self.command += ["--lora", ",".join(f'"{lora}"' for lora in loras)]

    def __enter__(self) -> "Server":
        self.log = tempfile.NamedTemporaryFile()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # llama-server also takes settings and keys from the environment.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "AIP_"))}
        started = time.perf_counter()
        command = [*self.command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=env)
        try:
            while not any(" listening on " in line for line in self.said()):
                if self.process.poll() is not None or time.perf_counter() - started > PATIENCE_SECONDS:
                    raise UserError(f"llama-server did not start ({self.first_error()})")
                time.sleep(0.02)
            self.load_seconds = time.perf_counter() - started
            self.letter = self.post("/tokenize", {"content": "a"})["tokens"][0]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def said(self) -> list[str]:
        return Path(self.log.name).read_text(errors="replace").splitlines()

    def first_error(self) -> str:
        lines = [line.strip() for line in self.said() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
        return (errors or lines or ["no output"])[0][:300]

    def post(self, path: str, body: dict) -> dict:
        """The JSON reply to a JSON request; raises UserError with the server's own message if it refuses."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"llama-server has stopped ({error}; {self.first_error()})") from None
        finally:
            connection.close()
        if reply.status != 200:
            raise UserError(f"llama-server refused {path}: {text[:300]}")
        return json.loads(text)

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Token ids that the server makes of a conversation: the file's chat template, then its tokenizer."""
        text = self.post("/apply-template", {"messages": messages})["prompt"]
        asked = {"content": text, "add_special": True, "parse_special": True}
        return self.post("/tokenize", asked)["tokens"]

    def answer(self, prompt: list[int], tokens: int, top: int = 0) -> dict:
        """Greedy reply to token ids: {prompt, text, timings, top: (ids, logprobs) of likely first tokens}.

        With `top` the text means nothing; without, it goes on over end tokens, for timings. No cache is used.
        """
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
        # A token that is half a character comes without a list, so another is forced; the list is raw anyway.
        listing = {"n_probs": top, "logit_bias": [[self.letter, 1000.0]]}
        reply = self.post("/completion", body | (listing if top else {"ignore_eos": True}))
        if (read := reply["tokens_evaluated"]) != len(prompt):
            raise UserError(f"llama-server read {read} tokens of a prompt of {len(prompt)}")
        listed = reply["completion_probabilities"][0]["top_logprobs"] if top else []
        likeliest = tuple(zip(*((t["id"], t["logprob"]) for t in listed)))
        return {"prompt": prompt, "text": reply["content"], "timings": reply["timings"], "top": likeliest}
