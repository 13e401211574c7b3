"""llama.cpp applies a model's chat template by itself: it has to write the prompt that was trained."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

from qlora import prompts as p
from qlora.fetch import PACKAGED_MODEL, fetch

sys.path.insert(0, str(ROOT / "llama.cpp"))
sys.path.insert(0, str(ROOT / "tests" / "core"))
from real_models import FAMILIES, TEMPLATES, tokenizer_of

from llama_server import Server
from settings import BIN

no_tools = pytest.mark.skipif(not (BIN / "llama-server").exists(), reason="llama.cpp/build.sh has not run")
TALK = [
    {"role": "user", "content": "Which film?"},
    {"role": "assistant", "content": "The second one."},
    {"role": "user", "content": "And why?"},
]


@no_tools
@pytest.mark.parametrize("name", ["qwen 3", "qwen 3.5", "smollm 3", "deepseek r1"])
def test_with_reasoning_off_the_server_writes_the_prompt_of_training(name):
    """Without the flag it asks the model to think. The weights do not matter: the bundled model stands in."""
    family = FAMILIES[name]
    ours = p.layout(tokenizer_of(family, ["a few words"]), TALK, True)
    written = {}
    for value in ("off", "on"):
        server = Server(fetch(PACKAGED_MODEL), context=256)
        template = TEMPLATES / f"{family.template}.jinja"
        server.command += ["--chat-template-file", str(template), "--reasoning", value]
        with server:
            text = server.post("/apply-template", {"messages": TALK})["prompt"]
        # BOS is the stand-in's own
        written[value] = text.removeprefix("<|im_start|>") if family.bos else text
    assert written["off"] == ours.removeprefix(family.bos or "")
    assert written["on"] != written["off"]
