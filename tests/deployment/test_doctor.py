"""The doctor: its verdict on made-up answers, a client in front of odd servers, and a real llama-server."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from qlora.adapters import read_adapter
from qlora.cli import UsageError, UserError
from qlora.files import SEAL

sys.path.insert(0, str(ROOT / "llama.cpp"))
import gguf_export
import parity
from doctor import judge, label_of, seen
from doctor import listed as listed_values
from doctor_questions import AS_TRAINED, Asked, Reference, Served
from llama_server import Server
from openai_api import Endpoint, Reply
from settings import BIN

ROWS, WORDS, TOP = 24, 12, 5
ANSWERS, ORIGINAL = ("No", "Yes"), "over the original base in bf16"
rng = np.random.default_rng(0)
BASE = rng.normal(0, 1, (ROWS, WORDS))  # scores of each word
NUDGE = 0.15 * rng.normal(size=BASE.shape)  # what 4 bits changed in the base


def adapter(seed: int) -> np.ndarray:
    """What an adapter adds: its two answers (words 0 and 1) become likely, one more than the other."""
    sure = np.random.default_rng(seed).normal(0, 2, ROWS)
    added = np.zeros((ROWS, WORDS))
    added[:, 0], added[:, 1] = 5 + sure, 5 - sure
    return added


def log_p(scores: np.ndarray) -> np.ndarray:
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


STRENGTHS = (1.0, 0.0, 0.5, 2.0, 0.25, 4.0)
REFERENCE = Reference(
    {
        (form, s): log_p(base + s * adapter(1))
        for form, base in ((AS_TRAINED, BASE), (ORIGINAL, BASE + NUDGE))
        for s in STRENGTHS
    },
    {AS_TRAINED: ["Paris."], ORIGINAL: ["Paris."]},
)
ASKED = Asked(None, [[]] * (ROWS + 1), 1, ANSWERS, (0, 1), [[7] * (9 + i) for i in range(ROWS + 1)])


def replies(scores: np.ndarray, top: int | None = TOP, read=lambda n: n) -> list[Reply]:
    """A server's answers with these scores; `read`: prompt tokens that it counts."""
    made = []
    for row, ids in zip(log_p(scores), ASKED.ids):
        best = np.argsort(-row)[:top] if top else []
        words = [*ANSWERS, *"cdefghijkl"]
        listed = (best.tolist(), row[best]) if top else None
        made.append(Reply(words[int(row.argmax())], read(len(ids)), listed))
    return made


def verdict(scores, base=None, top: int | None = TOP, read=lambda n: n) -> str | None:
    alone = None if base is None else replies(base)
    return judge(ASKED, REFERENCE, Served(replies(scores, top, read), [None] * ROWS, alone, ["Paris."])).fault


def test_what_a_short_list_shows_by_hand():
    """Of .6, .3, .1: tokens 0 and 2 in a list of two are .6 and .3, and .1 is left for the others."""
    logs = np.log([0.6, 0.3, 0.1])
    expected = logs - logs.mean()
    assert seen(logs, [0, 2], 2) == pytest.approx(expected[[0, 1, 2]])
    assert listed_values(([0, 1], logs[:2]), [0, 2]) == pytest.approx(expected)


@pytest.mark.parametrize("asked_base", [False, True])
@pytest.mark.parametrize(
    "strength, words",
    [(1, None), (0, "not applied"), (0.5, "acts like 0.5"), (2, "acts like 2"), (0.25, "acts like 0.25")],
)
@pytest.mark.parametrize("base", [BASE, BASE + NUDGE], ids=["as trained", "original"])
def test_strengths_are_told_apart_over_either_base(strength, words, base, asked_base):
    noise = 0.05 * np.random.default_rng(5).normal(size=BASE.shape)
    found = verdict(base + strength * adapter(1) + noise, base if asked_base else None)
    assert found is None if words is None else words in found


def test_another_adapter_is_told_from_none_where_the_base_can_be_asked():
    other = BASE + adapter(2)
    assert verdict(other).startswith("another adapter, or another base")
    assert verdict(other, BASE) == "another adapter"
    assert "not applied" in verdict(BASE, BASE)


def test_another_base_is_named_where_it_can_be_asked():
    other = BASE + 1.5 * np.random.default_rng(6).normal(size=BASE.shape)
    assert "another base" in verdict(other + adapter(1), other)
    assert "another base" in verdict(rng.normal(0, 3, BASE.shape))


def test_prompts_that_are_only_counted():
    good = BASE + adapter(1)
    assert "BOS is doubled or added" in verdict(good, read=lambda n: n + 1)
    assert "cuts prompts at 20 tokens" in verdict(good, read=lambda n: min(n, 20))
    assert "another chat template" in verdict(good, read=lambda n: n + 7)
    assert verdict(good, read=lambda n: None) is None


def test_without_lists_labels_alone_are_judged_and_no_more_is_claimed():
    assert verdict(BASE + adapter(1), top=None) is None
    assert "by the labels alone" in verdict(BASE, top=None)
    assert "no more is seen" in verdict(BASE + adapter(2), top=None)


def test_a_label_is_what_an_answer_begins_with():
    assert [label_of(ASKED, text) for text in (" yes.", "No", "Maybe", "")] == [1, 0, -1, -1]


# --- the client ---


@pytest.fixture
def odd_server():
    """Answers every path from the dict that it yields: (status, text), or a function of the request."""
    answers: dict = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = answers.get(self.path, (404, "no such path"))
            status, text = found(json.loads(body or "{}"), self.headers) if callable(found) else found
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", answers
    server.shutdown()


def models(*names, **facts) -> tuple[int, str]:
    return 200, json.dumps({"data": [{"id": name, **facts} for name in names]})


def test_a_server_that_can_t_be_used_gets_one_line(odd_server, tokenizer, monkeypatch):
    url, answers = odd_server
    connect = lambda address=url, model=None: Endpoint.connect(address, tokenizer, "mine", model)
    with pytest.raises(UsageError, match="not an http"):
        connect("localhost:8000")
    with pytest.raises(UserError, match="no server answers there"):
        connect("http://127.0.0.1:9/v1")
    for reply, words in (
        ((401, "no"), "set OPENAI_API_KEY"),
        ((200, "<html>"), "no JSON"),
        ((500, "broken"), "fails \\(500: broken"),
        ((200, "[]"), "no JSON"),
        (models(), "list of models is empty"),
        (models("a", "b"), "serves a, b: choose one with --served-model"),
    ):
        answers["/v1/models"] = reply
        with pytest.raises(UserError, match=words):
            connect()
    with pytest.raises(UsageError, match="serves a, b, not c"):
        answers["/v1/models"] = models("a", "b")
        connect(model="c")
    answers["/v1/models"] = lambda body, headers: (
        models("mine") if headers["Authorization"] == "Bearer secret" else (403, "no")
    )
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert connect().model == "mine" and connect().base_fields is None


def test_answers_that_lists_are_refused_for_or_that_are_none(odd_server, tokenizer):
    url, answers = odd_server
    answers["/v1/models"] = models("mine")
    there = Endpoint.connect(url, tokenizer, "mine", None)
    reply = {"choices": [{"message": {"content": "Positive"}}], "usage": {"prompt_tokens": 5}}
    answers["/v1/chat/completions"] = lambda body, _: (
        (400, "no logprobs here") if "logprobs" in body else (200, json.dumps(reply))
    )
    talk = [{"role": "user", "content": "Hi"}]
    assert there.ask(talk, 1) == Reply("Positive", 5, None)
    top = [{"token": "Positive", "logprob": -0.1}, {"token": "~ no token ~", "logprob": -3}]
    reply["choices"][0]["logprobs"] = {"content": [{"top_logprobs": top}]}
    answers["/v1/chat/completions"] = lambda body, _: (200, json.dumps(reply))
    ids, logs = there.ask(talk, 1).top
    assert ids == [tokenizer.convert_tokens_to_ids("Positive"), -1] and logs.tolist() == [-0.1, -3]
    for nonsense in ({}, {"choices": []}, {"choices": [{"message": None}]}):
        answers["/v1/chat/completions"] = (200, json.dumps(nonsense))
        with pytest.raises(UserError, match="no chat completion"):
            there.ask(talk, 1)


def test_tools_of_a_row_are_sent(odd_server, tokenizer):
    url, answers = odd_server
    answers["/v1/models"] = models("mine")
    seen_bodies = []
    reply = {"choices": [{"message": {"content": "x"}}]}
    answers["/v1/chat/completions"] = lambda body, _: seen_bodies.append(body) or (200, json.dumps(reply))
    tools = [{"type": "function", "function": {"name": "f"}}]
    Endpoint.connect(url, tokenizer, "mine", None).ask([{"role": "user", "content": "x"}], 1, tools=tools)
    assert seen_bodies[0]["tools"] == tools and seen_bodies[0]["temperature"] == 0


# --- a real llama-server ---


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained, tiny_folder) -> dict[str, Path]:
    """The tiny adapter with larger updates, its base and its LoRA file as GGUF."""
    from safetensors.torch import load_file, save_file

    aside = tmp_path_factory.mktemp("doctor")
    folder = aside / "strong"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", SEAL))
    path = folder / "adapter_model.safetensors"
    larger = {name: 16 * t if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(larger, path, metadata={"format": "pt"})
    gguf_export.convert(tiny_folder, aside / "base.gguf")
    lora = aside / "lora.gguf"
    gguf_export.convert(folder, lora, "convert_lora_to_gguf.py", "--base", str(tiny_folder))
    return {"adapter": folder, "base": aside / "base.gguf", "lora": lora, "out": aside / "out"}


def examine(files: dict, *flags: str, loras=()) -> dict:
    """The doctor's record of a llama-server with these flags."""
    server = Server(files["base"], loras)
    server.command += ["--threads", "1", *flags]
    with server:
        url = f"http://127.0.0.1:{server.port}/v1"
        asked = ["--endpoint", url, "--adapter", str(files["adapter"]), "--eval-samples", "8"]
        try:
            parity.main([*asked, "--output-dir", str(files["out"])])
        except UserError as error:
            assert error.exit_code == 1 and url in str(error)
    return json.loads((files["out"] / "doctor.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not (BIN / "llama-server").exists(), reason="llama.cpp/build.sh has not run")
def test_a_real_server_healthy_and_with_faults(files, capsys, tmp_path):
    pair, lora = [files["lora"]], str(files["lora"])
    healthy = examine(files, loras=pair)
    assert healthy["fault"] is None and healthy["server"] == "llama-server", healthy
    assert healthy["prompts"] == {"told": 8, "counted": 8, "differ": 0} and healthy["base"]["kl"] < 0.01
    assert "healthy" in capsys.readouterr().out and (files["out"] / "doctor.md").exists()
    plain = shutil.copytree(files["adapter"], tmp_path / "plain")  # of another tool: no notes, no labels
    (plain / "qlora.json").unlink()
    found = examine(files | {"adapter": plain}, loras=pair)
    assert found["questions"] == 8 and found["form"].startswith("over the base in") and found["drift"] < 0.1
    assert (
        "can't be judged" in found["fault"]
    )  # an adapter for reviews changes little of what is asked freely
    assert "not applied" in examine(files)["fault"]
    assert "acts like 0.5 times" in examine(files, "--lora-scaled", f"{lora}:0.5")["fault"]
    template = read_adapter(files["adapter"]).folder / "chat_template.jinja"
    doubled = tmp_path / "doubled.jinja"
    doubled.write_text("{{ bos_token }}" + template.read_text())
    assert "BOS is doubled" in examine(files, "--chat-template-file", str(doubled), loras=pair)["fault"]


def test_flags_that_do_not_go_together():
    with pytest.raises(UsageError, match="--served-model needs --endpoint"):
        parity.main(["--served-model", "x"])
    with pytest.raises(UsageError, match="leave --gguf"):
        parity.main(["--endpoint", "http://127.0.0.1:9/v1", "--gguf", "x.gguf"])
