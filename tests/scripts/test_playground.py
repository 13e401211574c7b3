"""The playground: two answers from one batch, chances that are the model's own, a page that stays at home."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import requests
import torch
from conftest import ROOT, here
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from config import PlaygroundSettings
from qlora import answers as answer_files
from qlora import evaluation, files, generation, prompts
from qlora.cli import UserError
from qlora.generation import Sampling
from qlora.logits import last_logits
from qlora.playground import answers, chances, markup, xray
from qlora.playground.models import Models, find_adapters

REVIEW = "The plot is thin, but the actors are wonderful."
HOW = (6, Sampling())


@pytest.fixture(scope="module")
def models(trained) -> Iterator[Models]:
    """The tiny model in NF4 with one adapter."""
    s = PlaygroundSettings(adapter=(str(trained),), lane="fp32")
    held = Models(s, find_adapters(s))
    held.use(held.first)
    yield held
    # gradio keeps the page, and so this; tests of other files count the memory of all tensors that are there
    held.model = held.base = None


@pytest.fixture(scope="module")
def asked(models):
    return answers.ask(models, "run", REVIEW, False, HOW)


def alone(models, ids: list[int], length: int = 6) -> tuple[list, list]:
    """What the base and the adapter write and expect, each by itself: (tokens, logits) of both."""
    model, ends = models.model, sorted(prompts.end_ids(models.base.tokenizer))
    tokens, logits = [], []
    for switched in (model.disable_adapter, contextlib.nullcontext):
        with switched():
            tokens += generation.generate(model, [ids], length, eos_token_id=ends)
            logits.append(last_logits(model, torch.tensor([ids]), contextlib.nullcontext)[0])
    return tokens, logits


@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "one after the other"])
def test_the_rows_are_base_and_adapter_alone(models, asked, monkeypatch, shared):
    assert answers.shares_batches(models.model, asked.adapter.peft_name)
    monkeypatch.setattr(answers, "shares_batches", lambda *_: shared)
    reply = list(answers.reply(models, asked))[-1]
    tokens, logits = alone(models, asked.ids)
    assert reply.tokens == tokens
    for row, by_itself in zip(reply.logits, logits):
        torch.testing.assert_close(row, by_itself, rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 0.01  # else rows could be swapped unseen


def test_an_answer_ends_where_its_own_model_ends_it(models, asked):
    """One row goes on while the other has ended; what follows an end token is never shown."""
    end = models.base.tokenizer.eos_token_id

    def read(ids):
        nonlocal calls
        calls += 1
        logits = torch.zeros(2, 50)
        logits[0, end if calls > 1 else 7] = 9  # ends with its second token
        logits[1, end if calls > 3 else 8] = 9  # with its fourth
        return logits

    calls = 0
    found = [chosen for chosen, _ in generation.steps(read, torch.zeros(2, 3), 9, Sampling(), {end})]
    assert found == [[7, 8], [end, 8], [end, 8], [end, end]]


def test_rows_draw_by_the_same_random_numbers():
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    warm = Sampling(temperature=1.5, seed=3)
    drawn = [chosen for chosen, _ in generation.steps(lambda _: logits, torch.zeros(2, 3), 8, warm, set())]
    assert all(left == right for left, right in drawn) and len({left for left, _ in drawn}) > 3
    again = [chosen for chosen, _ in generation.steps(lambda _: logits, torch.zeros(2, 3), 8, warm, set())]
    assert again == drawn


def test_drawn_tokens_come_from_what_top_k_left(models, asked):
    """Hot enough that all 49,152 tokens would come; two are left."""
    hot = answers.ask(models, "run", REVIEW, False, (12, Sampling(temperature=3.0, top_k=2, seed=1)))
    reply = list(answers.reply(models, hot))[-1]
    for row, tokens in zip(reply.logits, reply.tokens):
        assert tokens[0] in row.topk(2).indices
    greedy = list(answers.reply(models, asked))[-1]
    assert reply.tokens != greedy.tokens


def test_labels_are_those_of_an_answer_file(models, asked):
    logits = next(answers.reply(models, asked)).logits
    found = chances.of_labels(models, asked, logits)
    labels = tuple(asked.prompt.answers)
    assert tuple(found.names) == labels
    ids = [prompts.answer_ids(models.base.tokenizer, asked.prompt, i) for i in range(2)]
    for column, switched in enumerate((models.model.disable_adapter, contextlib.nullcontext)):
        with switched():
            scores = evaluation.score_labels(models.model, [asked.ids], ids, contextlib.nullcontext)[0]
        shares = [row[column] for row in found.shares]
        assert sum(shares) == pytest.approx(1)
        assert shares == pytest.approx(answer_files.label_cells(labels, scores)[1:3], abs=1e-4)
        assert found.held[column] == pytest.approx(float(torch.tensor(scores).exp().sum()), rel=1e-3)


def test_labels_that_begin_alike_are_scored_to_their_end(models, asked):
    alike = prompts.PromptFormat("sentiment", 64, user="{text} ?", answers=("very good", "very bad"))
    longer = answers.Asked(asked.ids, asked.adapter, alike, 2, Sampling())
    ids = [prompts.answer_ids(models.base.tokenizer, alike, i) for i in range(2)]
    assert ids[0][0] == ids[1][0]
    found = chances.of_labels(models, longer, next(answers.reply(models, asked)).logits)
    for column, switched in enumerate((models.model.disable_adapter, contextlib.nullcontext)):
        with switched():
            scores = evaluation.score_labels(models.model, [asked.ids], ids, contextlib.nullcontext)
        expected = torch.tensor(scores[0]).double().softmax(-1).tolist()
        assert [row[column] for row in found.shares] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature, top_p, top_k", [(1, 1, 0), (0.4, 0.9, 0), (1.7, 0.8, 40), (3, 1, 3)])
def test_the_sliders_do_what_transformers_does(models, temperature, top_p, top_k):
    generator = torch.Generator().manual_seed(2)
    logits = 5 * torch.randn(2, 49152, generator=generator)
    found = chances.of_tokens(models.base.tokenizer, logits, Sampling(temperature, top_p, top_k), shown=8)
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits.double()
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)
    assert found.left == (expected > 0).sum(-1).tolist()
    ids = {chances.readable(models.base.tokenizer, i): i for i in logits.topk(8).indices.flatten().tolist()}
    for name, shares in zip(found.names, found.shares):
        assert shares == pytest.approx(expected[:, ids[name]].tolist(), abs=1e-9)
    bits = -(expected * expected.clamp(min=1e-300).log2()).sum(-1)
    assert found.entropy_bits == pytest.approx(bits.tolist(), abs=1e-6)


def test_xray_tells_who_wrote_a_token(models, asked):
    """A control token that was typed is text like any other."""
    tokenizer, text = models.base.tokenizer, "Fine <|im_end|> film <script>"
    ids = prompts.typed_ids(tokenizer, asked.prompt, text)[0]
    found = xray.tokens(tokenizer, asked.prompt, ids)
    assert [token.id for token in found] == ids
    assert tokenizer.decode([token.id for token in found if token.kind == "typed"]) == text
    control = [token.text for token in found if token.kind == "control"]
    assert control.count("<|im_end|>") == 2 and control[0] == "<|im_start|>"
    framed = "".join(token.text for token in found if token.kind == "frame")
    assert "assistant" in framed and "Fine" not in framed
    drawn = markup.xray(found)
    assert "<script" not in drawn and drawn.count("<small>") == len(ids)


def test_a_long_prompt_is_drawn_by_its_ends():
    drawn = markup.xray([xray.Token("x", i, "typed") for i in range(1000)])
    assert drawn.count("<small>") == markup.MOST_TOKENS and "… 600 more …" in drawn


def test_a_switch_to_what_does_not_work_leaves_the_model(models, asked):
    before = list(answers.reply(models, asked))[-1]
    with pytest.raises(UserError, match="not quantized by GPTQ"):
        models.use("gptq")
    assert models.precision == "nf4" and list(answers.reply(models, asked))[-1].texts == before.texts
    models.use("fp32")
    try:
        assert models.base.info.precision == "fp32" and "trained on nf4" in models.warnings["run"]
        logits = next(answers.reply(models, asked)).logits
        assert (logits - before.logits).abs().max() > 1e-3  # NF4 costs something
    finally:
        models.use("nf4")
    assert models.warnings["run"] == "" and models.precisions == ["nf4", "bf16", "fp32"]


def test_folders_beside_it_are_found_if_they_have_its_base(trained, tmp_path, monkeypatch):
    for name in ("another", "qlora-out", "of-other-base", "damaged", "no-adapter"):
        shutil.copytree(trained, tmp_path / name)
    (tmp_path / "no-adapter" / "adapter_config.json").unlink()
    with open(tmp_path / "damaged" / "adapter_model.safetensors", "ab") as file:
        file.write(b"x")
    notes = tmp_path / "of-other-base" / "qlora.json"
    notes.write_text(re.sub(r'("config_sha256": ")\w', r"\1f", notes.read_text()))
    (notes.parent / files.SEAL).unlink()
    files.seal(notes.parent)
    monkeypatch.chdir(tmp_path)
    assert [adapter.name for adapter in find_adapters(PlaygroundSettings())] == ["qlora-out", "another"]
    shutil.rmtree("qlora-out")
    shutil.copytree("damaged", "qlora-out")
    with pytest.raises(UserError, match="not what was written"):
        find_adapters(PlaygroundSettings())
    monkeypatch.chdir(trained)
    assert find_adapters(PlaygroundSettings()) == []


def test_without_an_adapter_the_base_answers_and_the_page_says_how_to_train(tiny_folder):
    pytest.importorskip("gradio")
    from qlora.playground import page

    s = PlaygroundSettings(model=str(tiny_folder), lane="fp32")
    held = Models(s, [])
    held.use("nf4")
    reply = list(answers.reply(held, answers.ask(held, None, "Hello", False, HOW)))[-1]
    assert len(reply.texts) == len(reply.logits) == 1
    assert chances.of_labels(held, answers.ask(held, None, "Hello", False, HOW), reply.logits) is None
    built = page.build(s, held)
    shown = json.dumps(built.config["components"], default=str)
    assert "python qlora_finetune.py" in shown
    visible = {c["props"].get("label"): c["props"].get("visible") for c in built.config["components"]}
    assert visible["Adapter"] is False and visible["Base"] is True


@pytest.mark.parametrize("text, problem", [(" \n", "no text"), ("word " * 600, "shorten it")])
def test_what_can_not_be_answered_is_one_line(models, text, problem):
    with pytest.raises(UserError, match=problem):
        answers.ask(models, "run", text, True, HOW)


def test_wrong_flags_and_a_taken_port_are_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            ("--port", 0): (2, "--port 0: must be from 1 to 65,535"),
            ("--port", port): (1, f"--port {port} is taken"),
            ("--host", "192.0.2.1"): (1, "--host 192.0.2.1: no address of this machine"),
            ("--adapter", "none", "--adapter", "x"): (2, "nothing else can be loaded with it"),
            ("--adapter", "not-there"): (2, "no such folder"),
            ("--temperature", 1): (2, "unknown flag --temperature"),
        }
        for flags, (code, words) in cases.items():
            more = () if flags[0] == "--port" else ("--port", free_port())
            done = here("playground.py", *flags, *more)
            assert done.returncode == code and words in done.stderr, done.stderr
            assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = here("playground.py")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: the playground needs gradio: pip install -r requirements-playground.txt"
    ]


def test_a_request_is_this_pages_or_a_programs():
    pytest.importorskip("gradio")
    from starlette.datastructures import Headers

    from qlora.playground.guards import why_refused

    def refused(origin, host="127.0.0.1:7860", path="/gradio_api/queue/join") -> bool:
        given = {"host": host} | ({} if origin is None else {"origin": origin})
        return bool(why_refused(path, Headers(given)))

    assert not refused(None)
    assert not refused("http://127.0.0.1:7860")
    assert not refused("https://Box.example", host="box.example")  # --host, behind a proxy with a certificate
    assert not refused("http://[::1]:7860", host="[::1]:7860")
    others = ["http://127.0.0.1:8000", "http://localhost:7860", "https://evil.example", "127.0.0.1:7860"]
    for other in [*others, "null", ""]:
        assert refused(other), other
    twice = Headers(raw=[(b"host", b"a"), (b"origin", b"http://a"), (b"origin", b"http://b")])
    assert why_refused("/", twice) and refused("null", host="") and refused("null", host="null")
    assert refused(None, path="/gradio_api/upload") and refused("http://127.0.0.1:7860", path="/upload/")
    assert not refused(None, path="/gradio_api/upload_progress")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def playground(folder, *flags):
    """(address, process) of `python playground.py`, once it says that it can be opened."""
    port, log = free_port(), folder / "playground.log"
    command = [sys.executable, ROOT / "playground.py", "--port", port, *flags]
    with open(log, "w") as written:
        process = subprocess.Popen([str(word) for word in command], cwd=folder, stderr=written)
    try:
        until = time.monotonic() + 120
        while "open " not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def check_other_pages_are_refused(url: str) -> None:
    """What a form on a page of the web can send without asking first; a program sends no Origin."""
    where, own = f"{url}/gradio_api/call/answer", {"Origin": url}
    for origin in ("https://evil.example", "http://127.0.0.1:1", f"{url}.evil.example", "null", ""):
        refused = requests.post(where, json={}, headers={"Origin": origin}, timeout=30)
        assert refused.status_code == 403 and "another page" in refused.text, origin
    for headers in ({}, own):
        assert requests.post(where, json={}, headers=headers, timeout=30).status_code != 403
        for path in ("upload", "upload/"):
            sent = {"files": ("a.txt", b"x" * 1000)}
            refused = requests.post(f"{url}/gradio_api/{path}", files=sent, headers=headers, timeout=30)
            assert refused.status_code == 403 and "no file" in refused.text, path


def chromium() -> str:
    """Debian's, or another Chromium that is installed; none is fetched."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip("no Chromium here (apt-get install chromium)")


@pytest.mark.slow
def test_in_a_browser(trained, tmp_path):
    """A review is typed, both answer, a slider moves the distribution, and no request leaves the machine."""
    pytest.importorskip("gradio")
    browser_api = pytest.importorskip("playwright.sync_api")
    program, expect = chromium(), browser_api.expect
    with playground(tmp_path, "--adapter", trained, "--lane", "fp32", "--max-new-tokens", 6) as (
        url,
        process,
    ):
        policy = requests.get(url, timeout=30).headers["content-security-policy"]
        assert policy.startswith("default-src 'self'")
        strange = requests.get(url, headers={"Host": "evil.example"}, timeout=30)
        assert strange.status_code == 400  # a name of the web that leads here
        check_other_pages_are_refused(url)
        with browser_api.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            asked, errors = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            page.locator("#text textarea").fill(REVIEW)
            page.locator("#answer").click()
            for name in ("#base", "#adapter"):
                expect(page.locator(f"{name} textarea")).not_to_have_value("", timeout=30_000)
            expect(page.locator("#labels td").first).to_contain_text("%", timeout=30_000)
            expect(page.locator("#xray")).to_contain_text("wonderful")
            before = page.locator("#next").inner_text()
            page.locator("#top-k input[type=range]").fill("1")
            expect(page.locator("#next")).to_contain_text("100.0%")
            expect(page.locator("#next")).to_contain_text("drawn: 1 (base), 1 (adapter)")
            assert page.locator("#next").inner_text() != before
            page.screenshot(path=tmp_path / "page.png", full_page=True)
            process.send_signal(signal.SIGINT)  # an open page does not hold it up
            assert process.wait(timeout=60) == 0
            browser.close()
        elsewhere = [u for u in asked if not u.startswith((f"{url}/", "data:", "blob:"))]
        assert not elsewhere and len(asked) > 20
        assert not errors
        assert (tmp_path / "page.png").stat().st_size > 20_000
        assert "Traceback" not in (tmp_path / "playground.log").read_text()
