"""Client of a server that speaks OpenAI's API: llama-server, vLLM, Ollama, LM Studio and others.

The key, where a server wants one, comes from the environment (OPENAI_API_KEY) and is sent nowhere else.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import requests

from qlora.cli import UserError, require
from qlora.control_tokens import template_variables
from qlora.fetch import hide_passwords

TOP = 20  # likely tokens asked for: the most that OpenAI's API gives
PATIENCE_SECONDS = 600  # a large model on a CPU


@dataclass
class Reply:
    text: str
    prompt_tokens: int | None
    # Of the reply's first token: ids and log-probabilities of the likeliest; None without such a list
    top: tuple[list[int], np.ndarray] | None = None


@dataclass
class Endpoint:
    """`url` up to /v1, the served model's name, and how its base alone can be asked (None: it can't be)."""

    url: str
    tokenizer: object
    model: str = ""
    kind: str = "unknown"  # llama-server, vllm or unknown
    base_fields: dict | None = None  # of a request to the base
    few_bits: bool | None = None  # whether its weights have fewer than 7 bits; None: unknown
    ids_of: dict[str, int] = field(default_factory=dict)

    @classmethod
    def connect(cls, url: str, tokenizer, adapter: str, model: str | None) -> "Endpoint":
        """Finds the model to ask and the kind of server; raises UserError, UsageError in one line."""
        there = cls(url.rstrip("/"), tokenizer)
        url = there.shown
        require(url.startswith(("http://", "https://")), f"--endpoint {url}: not an http:// address")
        listed = there.get("/models").get("data")
        cards = {card["id"]: card for card in listed or [] if isinstance(card, dict) and "id" in card}
        if not cards:
            raise UserError(f"--endpoint {url}: its list of models is empty; load one there first")
        adapted = [name for name, card in cards.items() if card.get("parent")]
        likely = [model] if model else [adapter] if adapter in cards else adapted or list(cards)
        served = f"--endpoint {url} serves {', '.join(cards)}"
        require(model is None or model in cards, f"{served}, not {model}: choose with --served-model")
        require(len(likely) == 1, f"{served}: choose one with --served-model")
        (there.model,) = likely
        there.find_base(cards)
        there.few_bits = there.find_bits(cards[there.model])
        there.ids_of = ids_by_text(tokenizer)
        return there

    def find_base(self, cards: dict) -> None:
        """What kind of server it is, and how it is asked for the base without the adapter."""
        parent = cards[self.model].get("parent")
        if cards[self.model].get("owned_by") == "vllm":
            self.kind = "vllm"
            self.base_fields = {"model": parent} if parent else None
            return
        loras = self.root_get("/lora-adapters")
        if isinstance(loras, list) and all(isinstance(lora, dict) and "id" in lora for lora in loras):
            self.kind = "llama-server"
            off = [{"id": lora["id"], "scale": 0.0} for lora in loras]
            self.base_fields = {"lora": off} if off else None

    def find_bits(self, card: dict) -> bool | None:
        """By llama-server's size, or by the name of the type that Ollama and LM Studio tell."""
        meta = card.get("meta") or {}
        if meta.get("size") and meta.get("n_params"):
            return 8 * meta["size"] / meta["n_params"] < 7
        if self.kind == "vllm":
            return False
        told = [*self.listed_at("/api/tags", "models"), *self.listed_at("/api/v0/models", "data")]
        for entry in told:  # Ollama's, LM Studio's
            if self.model in (entry.get("name"), entry.get("model"), entry.get("id")):
                name = (entry.get("details") or {}).get("quantization_level") or entry.get("quantization")
                return bool(re.match(r"I?Q[1-6]", name, re.I)) if name else None
        return None

    # --- requests ---

    @property
    def shown(self) -> str:
        """The address without a password in it."""
        return hide_passwords(self.url)

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def get(self, path: str) -> dict:
        return self.checked("GET", self.url + path)

    def root_get(self, path: str):
        """The JSON of a path that only some servers have; None elsewhere."""
        try:
            reply = requests.get(self.root + path, headers=self.headers(), timeout=30)
            return reply.json() if reply.ok else None
        except (requests.RequestException, ValueError):
            return None

    def listed_at(self, path: str, name: str) -> list[dict]:
        found = self.root_get(path)
        entries = found.get(name) if isinstance(found, dict) else None
        return [entry for entry in entries or [] if isinstance(entry, dict)]

    def headers(self) -> dict:
        key = os.environ.get("OPENAI_API_KEY")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def checked(self, method: str, url: str, body: dict | None = None) -> dict:
        """A JSON object; raises UserError with what the server says."""
        name = f"--endpoint {self.shown}"
        try:
            reply = requests.request(method, url, json=body, headers=self.headers(), timeout=PATIENCE_SECONDS)
        except requests.RequestException as error:
            cause = type(error).__name__
            raise UserError(f"{name}: no server answers there ({cause}); start it, or put it right") from None
        if reply.status_code in (401, 403):
            raise UserError(f"{name} wants a key: set OPENAI_API_KEY")
        if not reply.ok:
            said = " ".join(reply.text.split())[:300]
            raise Refused(f"{name}: {url.removeprefix(self.root)} fails ({reply.status_code}: {said})")
        try:
            found = reply.json()
            if not isinstance(found, dict):
                raise ValueError
        except ValueError:
            raise UserError(f"{name} sends no JSON; give the address up to /v1") from None
        return found

    def ask(self, messages: Sequence[dict], tokens: int, base: bool = False, tools=None) -> Reply:
        """The greedy reply to a conversation, asked as a client would; `base`: without the adapter."""
        body = {"model": self.model, "messages": list(messages), "max_tokens": tokens, "temperature": 0}
        body |= {"logprobs": True, "top_logprobs": TOP} | ({"tools": tools} if tools else {})
        body |= self.base_fields if base else {}
        if used := variables_of(self.tokenizer.chat_template):
            body["chat_template_kwargs"] = used
        if self.kind == "vllm":  # exact: two tokens can share a text
            body["return_tokens_as_token_ids"] = True
        if self.kind == "llama-server":
            body["cache_prompt"] = False
        try:
            found = self.checked("POST", self.url + "/chat/completions", body)
        except Refused:  # some servers refuse to list probabilities
            del body["logprobs"], body["top_logprobs"]
            found = self.checked("POST", self.url + "/chat/completions", body)
        return self.read(found)

    def read(self, found: dict) -> Reply:
        try:
            choice = found["choices"][0]
            text = choice["message"].get("content") or ""
            read = (found.get("usage") or {}).get("prompt_tokens")
            listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs")
            top = self.listed(listed) if listed else None
        except (LookupError, TypeError, AttributeError, ValueError):
            raise UserError(f"--endpoint {self.shown}: its answer is no chat completion") from None
        return Reply(str(text), read if isinstance(read, int) else None, top)

    def listed(self, tokens: list[dict]) -> tuple[list[int], np.ndarray]:
        """(ids, log-probabilities); id -1 where a token's text is no token of ours."""
        ids = [self.id_of(token) for token in tokens]
        return ids, np.array([max(float(token["logprob"]), -100.0) for token in tokens])

    def id_of(self, token: dict) -> int:
        text = token["token"]
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        if isinstance(token.get("id"), int):
            return token["id"]
        return self.ids_of.get(text, -1)

    def prompt_ids(self, messages: Sequence[dict]) -> list[int] | None:
        """Token ids that the server makes of a conversation; None where it does not tell."""
        body: dict = {"messages": list(messages), "add_generation_prompt": True}
        if used := variables_of(self.tokenizer.chat_template):
            body["chat_template_kwargs"] = used
        try:
            if self.kind == "vllm":
                reply = self.checked("POST", self.root + "/tokenize", body | {"model": self.model})
                return reply["tokens"]
            if self.kind == "llama-server":
                text = self.checked("POST", self.root + "/apply-template", body)["prompt"]
                asked = {"content": text, "add_special": True, "parse_special": True}
                return self.checked("POST", self.root + "/tokenize", asked)["tokens"]
        except (Refused, KeyError):
            pass
        return None


class Refused(UserError):
    """The server understood and said no."""


def variables_of(template: str) -> dict:
    """The variables that a chat template asks for, as training set them."""
    return {name: value for name, value in template_variables(False).items() if name in template}


def ids_by_text(tokenizer) -> dict[str, int]:
    """{text of a token: its id}; texts that several tokens share are left out."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if any("▁" in piece for piece in pieces[:1000]):  # SentencePiece: decoding would drop the space
        texts = [piece.replace("▁", " ") for piece in pieces]
    else:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
    known: dict[str, int] = {}
    for i, text in enumerate(texts):
        known[text] = -1 if text in known else i
    return known
