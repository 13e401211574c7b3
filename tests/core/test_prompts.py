"""Prompts: the same ids in training, evaluation and inference, and those of the chat template."""

from dataclasses import asdict

import pytest

from config import FEW_SHOT, SENTIMENT_ANSWERS, SENTIMENT_QUESTION, SENTIMENT_SYSTEM, InferSettings
from qlora import prompts as p
from qlora.cli import UserError
from qlora.files import read_json, write_json

PROMPT = p.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, 96)
REVIEW = p.clean(" A fine film.<br /><br />See it.")


def test_example_is_the_chat_templates_text(tokenizer):
    ids, _ = p.sentiment_example(tokenizer, PROMPT, REVIEW, 1)
    messages = [
        {"role": "system", "content": SENTIMENT_SYSTEM},
        {"role": "user", "content": "A fine film.\n\nSee it.\n\n" + SENTIMENT_QUESTION},
        {"role": "assistant", "content": "Positive"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    # The template goes on with a line break after <|im_end|>; generation has stopped by then.
    assert whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]) == "\n"


def test_only_answer_and_end_are_supervised(tokenizer):
    ids, labels = p.sentiment_example(tokenizer, PROMPT, REVIEW, 0)
    assert labels[-2:] == ids[-2:] == [tokenizer.encode("Negative")[0], tokenizer.eos_token_id]
    assert set(labels[:-2]) == {p.IGNORE}


def test_training_evaluation_and_inference_agree(tokenizer, reviews):
    from types import SimpleNamespace

    import qlora_inference

    qlora_inference.import_libraries()
    for row in reviews[:6]:
        trained = p.sentiment_example(tokenizer, PROMPT, row.text, row.label)[0]
        evaluated = p.sentiment_prompt(tokenizer, PROMPT, row.text)
        used = qlora_inference.to_ids(
            InferSettings(), SimpleNamespace(prompt=PROMPT), SimpleNamespace(tokenizer=tokenizer), row.text
        )
        assert evaluated == used == trained[: len(evaluated)]


def test_a_plain_message_stays_as_it_is_typed(tokenizer):
    from types import SimpleNamespace

    import qlora_inference

    qlora_inference.import_libraries()
    base = SimpleNamespace(tokenizer=tokenizer, context_length=512)
    chat = SimpleNamespace(prompt=p.PromptFormat("chat", 64))
    for adapter in (None, chat):
        assert "<br />" in tokenizer.decode(
            qlora_inference.to_ids(InferSettings(), adapter, base, "a <br /> b")
        )


def test_prompt_survives_its_file(tokenizer, tmp_path):
    write_json(tmp_path / "prompt.json", asdict(PROMPT))
    again = read_json(tmp_path / "prompt.json", "", p.PromptFormat)
    assert again == PROMPT and p.sentiment_prompt(tokenizer, again, REVIEW) == p.sentiment_prompt(
        tokenizer, PROMPT, REVIEW
    )


def test_long_review_keeps_its_end_and_fits(tokenizer, reviews):
    for row in reviews:
        ids, labels = p.sentiment_example(tokenizer, PROMPT, row.text, row.label)
        assert len(ids) <= PROMPT.max_length
        text = tokenizer.decode(ids)
        assert row.text[-20:] in text and f"\n\n{SENTIMENT_QUESTION}" in text


def test_shortening_to_nothing_leaves_nothing(tokenizer):
    assert [p.shorten(tokenizer, "one two three", tokens) for tokens in (2, 0, -1)] == ["two three", "", ""]


def test_no_room_for_a_review(tokenizer):
    with pytest.raises(UserError, match="--max-length 20 leaves no room"):
        p.sentiment_prompt(tokenizer, p.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, 20), REVIEW)


def test_the_question_fits_the_labels():
    reviews = p.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, 96)
    assert (reviews.system, reviews.user) == (SENTIMENT_SYSTEM, "{text}\n\n" + SENTIMENT_QUESTION)
    # once 0 and 1 about anything were asked the reviews' question
    spam = p.choose_format("sentiment", "labels", ("0", "1"), 96)
    assert (spam.system, spam.user) == ("", "{text}\n\nWhich label fits: 0, 1?")
    asked = p.choose_format("sentiment", "labels", ("ham", "spam"), 96, "Is this spam?")
    assert (asked.system, asked.user, asked.answers) == ("", "{text}\n\nIs this spam?", ("ham", "spam"))
    around = p.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, 96, "Judge {text} in one word.")
    assert (around.system, around.user) == ("", "Judge {text} in one word.")


def test_review_with_braces_is_text(tokenizer):
    assert "{0} {text}" in tokenizer.decode(p.sentiment_prompt(tokenizer, PROMPT, "{0} {text}"))


def test_few_shot_rows_share_their_beginning(tokenizer):
    from qlora.evaluation import shared_prefix

    rows = [p.sentiment_prompt(tokenizer, PROMPT, text, FEW_SHOT) for text in ("Good.", "Bad, very bad.")]
    examples = p.render(tokenizer, p.sentiment_messages(PROMPT, "", FEW_SHOT)[:-1], False)
    assert shared_prefix(rows) >= len(examples)


def test_system_role_refused_by_template_moves_to_user(tokenizer, bundled_folder):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(bundled_folder)
    other.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    text = other.decode(p.sentiment_prompt(other, PROMPT, "Fine."))
    assert text == f"[user] {SENTIMENT_SYSTEM}\n\nFine.\n\nIs this review positive or negative?[assistant] "


MISTRAL = (  # the shape of Mistral v0.3's: system text goes to the last message, and only if that is a user's
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_template_that_drops_the_system_text_once_answered(bundled_folder):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(bundled_folder)
    other.chat_template = MISTRAL
    ids, labels = p.sentiment_example(other, PROMPT, "Fine.", 1)
    assert SENTIMENT_SYSTEM in other.decode(ids) and other.decode(ids).endswith("[/INST] Positive<|im_end|>")
    assert p.takes_system(other.chat_template) is False


def test_prompt_does_not_change_with_the_date(bundled_folder, monkeypatch):
    # Llama 3.x writes today's date unless it is given one
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(bundled_folder)
    other.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y %f') }}" + other.chat_template
    )
    assert p.sentiment_prompt(other, PROMPT, "Fine.") == p.sentiment_prompt(other, PROMPT, "Fine.")
    assert "26 Jul 2024" in other.decode(p.sentiment_prompt(other, PROMPT, "Fine."))


def test_digits_after_white_space_are_split_as_the_model_was_trained(tokenizer):
    """transformers 5.23 builds this GGUF's tokenizer with GPT-2's rule: three tokens; SmolLM2 and llama.cpp
    make two of it."""
    assert tokenizer.tokenize("\n\n2") == ["ĊĊ", "2"] and tokenizer.tokenize("a  10") == ["a", "ĠĠ", "1", "0"]
    assert tokenizer.tokenize(" in 1999") == ["Ġin", "Ġ", "1", "9", "9", "9"]


def test_no_chat_template_keeps_turns_in_order(bundled_folder):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(bundled_folder)
    other.chat_template = None
    talk = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    assert other.decode(p.render(other, talk, True)) == "a?\n\nAnswer: b<|im_end|>\n\nc?\n\nAnswer:"


def test_no_chat_template_gets_a_plain_layout_with_end_token(tokenizer, bundled_folder):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(bundled_folder)
    other.chat_template = None
    ids, labels = p.sentiment_example(other, PROMPT, "Fine.", 1)
    assert other.decode(ids).endswith("\n\nAnswer: Positive<|im_end|>")
    assert labels[-1] == other.eos_token_id and labels[0] == p.IGNORE


def test_lm_labels_are_the_input(tokenizer):
    ids, labels = p.lm_example(tokenizer, "Once upon a time", 64)
    assert ids == labels and ids[-1] == tokenizer.eos_token_id
    assert len(p.lm_example(tokenizer, "word " * 100, 16)[0]) == 16
