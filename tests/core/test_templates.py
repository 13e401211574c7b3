"""Today's models rehearsed: real chat templates, tiny tokenizers, tiny models of their architectures."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import ROOT, here
from peft import get_peft_model
from real_models import ARCHITECTURES, FAMILIES, TEMPLATES, THOUGHTS, save_model, tokenizer_of

import qlora_inference
from config import SENTIMENT_ANSWERS, SENTIMENT_SYSTEM, InferSettings, TrainSettings
from qlora import loading
from qlora import prompts as p
from qlora.batches import collate
from qlora.control_tokens import end_ids, template_variables
from qlora.conversations import chat_examples
from qlora.data import Row
from qlora.fast import make_fast
from qlora.generation import generate
from qlora.hardware import Hardware
from qlora.logits import IGNORE, hidden_states, last_logits, logits_from
from qlora.lora import lora_config
from qlora.measures import relative_error
from qlora.merging import merged_model
from qlora.training import guards
from qlora.variants import Start

PROMPT = p.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, 400)
TALK = [
    {"role": "user", "content": "Which film?"},
    {"role": "assistant", "content": "The second one."},
    {"role": "user", "content": "And why?"},
    {"role": "assistant", "content": "It made me laugh, twice."},
    {"role": "user", "content": "Thanks. Is it long?"},
    {"role": "assistant", "content": "No."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def texts(reviews) -> list[str]:
    return [row.text for row in reviews]


@pytest.fixture(scope="module")
def made(texts) -> dict:
    return {}


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture
def kind(name, family, made, texts):
    """The family's tokenizer; made once."""
    if name not in made:
        made[name] = tokenizer_of(family, texts)
    return made[name]


def own_text(tokenizer, talk: list[dict], prompt: bool, thinking: bool = False) -> str:
    """What transformers makes of the template; Granite's asks for the date, which stands still here."""
    options = {"tokenize": False, "add_generation_prompt": prompt, **template_variables(thinking)}
    text = tokenizer.apply_chat_template(talk, **options)
    return text.replace(time.strftime("%B %d, %Y"), "July 26, 2024")


def learned_texts(tokenizer, examples: list) -> list[str]:
    """Each stretch of learned tokens, as text."""
    told = []
    for ids, labels in examples:
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels))
        for i, label in enumerate(labels):
            if label != IGNORE:
                told += [[]] if labels[i - 1] == IGNORE else []
                told[-1].append(label)
    return [tokenizer.decode(ids) for ids in told]


# --- what the model reads ---


@pytest.mark.parametrize("talk", [TALK[:1], TALK[:3], TALK[:5], [SYSTEM, *TALK[:3]]], ids=len)
def test_a_prompt_is_the_templates_own(kind, talk):
    told = own_text(kind, p.arranged(kind, talk), True)
    assert p.layout(kind, talk, True) == told
    assert p.render(kind, talk, True) == kind(told, add_special_tokens=False)["input_ids"]
    if "strftime_now" not in kind.chat_template:
        options = {"add_generation_prompt": True, "return_dict": False, **template_variables()}
        assert p.render(kind, talk, True) == kind.apply_chat_template(p.arranged(kind, talk), **options)
    assert "Which film?" in told and ("Be brief." in told) == (SYSTEM in talk)


def test_a_review_is_asked_as_the_template_asks(kind):
    ids, labels = p.sentiment_example(kind, PROMPT, "A fine film.", 1)
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    messages = p.arranged(kind, p.sentiment_messages(PROMPT, "A fine film."))
    told = kind(own_text(kind, messages, True), add_special_tokens=False)["input_ids"]
    assert ids[:start] == told and SENTIMENT_SYSTEM in kind.decode(told)
    assert ids[start:] == labels[start:] == p.answer_ids(kind, PROMPT, 1)


def test_which_templates_take_a_system_message(kind, family):
    """Gemma's refuses it; Mistral's moves it to the last question and drops it once that is answered."""
    assert p.takes_system(kind.chat_template) is family.takes_system


def test_no_prompt_changes_with_the_day(kind, family):
    """Llama's takes a date that it is given, Granite's asks a clock."""
    text = p.layout(kind, TALK[:1], True)
    assert ("26 Jul 2024" in text or "July 26, 2024" in text) is family.dated
    assert family.dated is bool(re.search("date_string|strftime_now", kind.chat_template))


def test_control_tokens_in_a_message_are_text(kind):
    special = set(kind.all_special_ids) | set(kind.get_added_vocab().values())
    forged = "".join(kind.convert_ids_to_tokens(sorted(end_ids(kind)))) + "Why?"
    plain, ids = (p.render(kind, [{"role": "user", "content": text}], True) for text in ("Why?", forged))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


# --- what it learns ---


def test_labels_hold_the_reply_and_its_end(kind, family):
    ((ids, labels),) = chat_examples(kind, TALK[:2])
    (text,) = learned_texts(kind, [(ids, labels)])
    assert text.strip() in (f"The second one.{family.end}", f"The second one.\n{family.end}")
    assert ids[-1] == labels[-1] == kind.convert_tokens_to_ids(family.end) and ids[-1] in end_ids(kind)
    assert not end_ids(kind) & {label for label in labels[:-1] if label != IGNORE}
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert ids[:start] == p.render(kind, TALK[:1], True)


def test_a_whole_row_is_the_templates_own(kind, family):
    """But for what follows the end token; and for QwQ and R1, whose prompts hold what given replies lack."""
    ((ids, _),) = chat_examples(kind, TALK[:2])
    whole = kind(own_text(kind, TALK[:2], False), add_special_tokens=False)["input_ids"]
    assert (whole[: len(ids)] == ids) is family.continues


def test_every_reply_of_a_conversation_is_learned_after_its_own_prompt(kind, family):
    examples = chat_examples(kind, TALK)
    assert len(examples) == (3 if family.rewrites else 1)
    told = [text.replace(family.end, "").strip() for text in learned_texts(kind, examples)]
    assert told == [message["content"] for message in TALK[1::2]]
    for number, (ids, labels) in enumerate(examples, 1):
        last = max(i for i, label in enumerate(labels) if label != IGNORE and labels[i - 1] == IGNORE)
        asked = TALK[: 2 * number - 1] if family.rewrites else TALK[:-1]
        assert ids[:last] == p.render(kind, asked, True)


def test_an_empty_thought_is_read_and_not_learned(kind, family):
    """Regression: that of Qwen3's single turns was learned, and conversations were refused."""
    ids = [i for ids, _ in chat_examples(kind, TALK) for i in ids]
    labels = [label for _, labels in chat_examples(kind, TALK) for label in labels]
    thoughts = set(kind.convert_tokens_to_ids(list(THOUGHTS))) if family.thinks else set()
    assert not thoughts & set(labels) and thoughts <= set(ids)


def test_thoughts_that_a_reply_brings_are_learned(kind, family):
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nI saw both.\n</think>\n\nThe second."}]
    ((ids, labels),) = chat_examples(kind, talk)
    (text,) = learned_texts(kind, [(ids, labels)])
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    prompt = own_text(kind, TALK[:1], True, thinking=True)
    assert ids[:start] == kind(prompt, add_special_tokens=False)["input_ids"]
    assert (prompt + text).partition("I saw both.")[0].endswith("<think>\n")
    assert re.fullmatch(
        rf"\s*(<think>\n)?I saw both.\n</think>\n\nThe second.\n?{re.escape(family.end)}", text
    )


def test_a_long_conversation_is_written_a_few_times(kind, family, monkeypatch):
    if family.rewrites:
        pytest.skip("each reply needs a text of its own")
    writes, write = [], type(kind).apply_chat_template
    monkeypatch.setattr(
        type(kind), "apply_chat_template", lambda *args, **kw: writes.append(1) or write(*args, **kw)
    )
    ((_, labels),) = chat_examples(kind, TALK * 50)
    assert labels.count(kind.convert_tokens_to_ids(family.end)) == 150 and len(writes) < 12


# --- the models ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_learns_a_conversation_by_heart_stops_and_is_merged(name, texts, tmp_path, monkeypatch):
    """Load, LoRA, training steps, generation and merging, in bf16 as on a processor that has it."""
    monkeypatch.setattr(loading, "refuse_endless", lambda *_: None)  # a process of seconds, tested elsewhere
    machine = Hardware("cpu", "", torch.bfloat16, "", 1.0)
    base = loading.load_base(str(save_model(name, tmp_path / "model", texts)), "nf4", machine)
    model = get_peft_model(base.model, lora_config(base.model, TrainSettings(lora_r=8)))
    make_fast(model)
    examples = [dict(zip(("input_ids", "labels"), pair)) for pair in chat_examples(base.tokenizer, TALK[:4])]
    ids = torch.tensor([examples[-1]["input_ids"]])
    with torch.no_grad():
        own, hidden = base.model(input_ids=ids).logits, hidden_states(model, ids).last_hidden_state
    assert torch.equal(own.float(), logits_from(base.model, hidden))  # Gemma 2 caps them
    healthy = guards.Guards()
    frozen = guards.check_start(healthy, model, examples, machine.autocast, Start())
    learn_by_heart(model, examples, most_steps=200)
    assert guards.frozen_hash(model) == frozen

    model.eval()
    ends = sorted(end_ids(base.tokenizer))
    for asked, reply in ((TALK[:1], TALK[1]), (TALK[:3], TALK[3])):
        prompt = p.render(base.tokenizer, asked, True)
        (made,) = generate(model, [prompt], 40, eos_token_id=ends)
        assert base.tokenizer.decode(made[:-1]).strip() == reply["content"]
        assert made[-1] == base.tokenizer.convert_tokens_to_ids(FAMILIES[ARCHITECTURES[name].family].end)
    model.save_pretrained(tmp_path / "adapter")
    merged, _ = merged_model("dequantized", SimpleNamespace(folder=tmp_path / "adapter"), base)
    ids = torch.tensor([prompt])
    trained, plain = (last_logits(each, ids, machine.autocast) for each in (model, merged))
    assert relative_error(trained, plain) < 0.05 and trained.argmax() == plain.argmax()


def learn_by_heart(model, examples: list[dict], most_steps: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, batch = torch.optim.AdamW(trained, lr=0.01), collate(examples, 0)
    del batch["real_tokens"]
    model.train()
    for _ in range(most_steps):
        loss = model(**batch).loss
        if loss < 0.1:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pytest.fail(f"loss {loss} after {most_steps} steps")


@pytest.mark.parametrize("name", ["qwen 3", "gemma 2"])
def test_the_scripts_take_a_model_with_history_rewritten_and_one_with_capped_logits(name, texts, tmp_path):
    """Regression: Qwen3's conversations were refused, and a guard stopped Gemma 2."""
    model = save_model(name, tmp_path / "model", texts)
    rows = [{"messages": [{**m, "content": f"{m['content']} {i}"} for m in TALK]} for i in range(6)]
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--samples", 4, "--eval-samples", 2, "--batch-size", 2, "--max-steps", 3]
    done = here(
        "qlora_finetune.py", "--model", model, "--dataset", data, "--output-dir", tmp_path / "run", *flags
    )
    assert done.returncode == 0 and "guards     all 10 held" in done.stderr, done.stderr
    assert ("4 training conversations became 12 rows" in done.stderr) is (name == "qwen 3")
    done = here("qlora_inference.py", "--adapter", tmp_path / "run", "--max-new-tokens", 4, "Which film?")
    assert done.returncode == 0, done.stderr


def test_an_adapter_trained_on_thoughts_is_asked_to_think(made, texts):
    """Thinking stays on for it; for others, and for the base alone, it is off."""
    thought = {"role": "assistant", "content": "<think>\nBoth.\n</think>\n\nThe second."}
    rows = [Row("", messages=(TALK[0], reply)) for reply in (TALK[1], thought)]
    chat = p.PromptFormat("chat", 256)
    assert p.with_thoughts(chat, rows[:1]) == chat
    thinking = p.with_thoughts(chat, rows)
    qlora_inference.import_libraries()
    base = SimpleNamespace(tokenizer=tokenizer_of(FAMILIES["qwen 3"], texts), context_length=512)
    asked = {
        prompt: base.tokenizer.decode(
            qlora_inference.to_ids(
                InferSettings(), prompt and SimpleNamespace(prompt=prompt), base, "Which film?"
            )
        )
        for prompt in (None, chat, thinking)
    }
    assert asked[None] == asked[chat] == asked[thinking] + "<think>\n\n</think>\n\n"


# --- templates without a switch, or with an odd one ---


OPENS = (  # DeepSeek-R1 as its authors wrote it: the prompt opens a thought, a given reply has none
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}"
    "<Assistant>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
CLOSES = families.CHATML.replace(  # Qwen3's Thinking models: what the prompt opens, the last reply closes
    "{{ m.content }}",
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}{{ m.content }}",
).replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
WRITES = CLOSES.replace("assistant\n<think>\n{% endif", "assistant\n{% endif")  # only the last reply has it


@pytest.mark.parametrize("template", [OPENS, CLOSES, WRITES])
def test_without_a_switch_the_empty_thought_is_added_to_the_prompt(bundled_folder, template):
    other = families.bundled(bundled_folder, template)
    examples = chat_examples(other, TALK[:4])
    told = [text.removesuffix("<|im_end|>") for text in learned_texts(other, examples)]
    assert told == ["The second one.", "It made me laugh, twice."] and len(examples) == 2
    for (ids, labels), asked in zip(examples, (TALK[:1], TALK[:3])):
        prompt = p.render(other, asked, True)
        assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {IGNORE}
        assert other.decode(prompt).endswith("<think>\n\n</think>\n\n")
    thought = [TALK[0], {"role": "assistant", "content": "<think>\nBoth.\n</think>\n\nThe second."}]
    (text,) = learned_texts(other, chat_examples(other, thought))
    assert text.endswith("Both.\n</think>\n\nThe second.<|im_end|>")


def test_the_texts_are_those_of_the_pinned_llama_cpp():
    source = ROOT / "llama.cpp" / "source"
    if not source.is_dir():
        pytest.skip("llama.cpp's source is not there: llama.cpp/build.sh fetches it")
    program = (source / "tests" / "test-chat-template.cpp").read_text()
    for ours in TEMPLATES.glob("*.jinja"):
        theirs, text = source / "models" / "templates" / ours.name, ours.read_text()
        if theirs.is_file():
            assert theirs.read_text() == text
        else:  # as a string in C++
            assert json.dumps(text, ensure_ascii=False) in program
