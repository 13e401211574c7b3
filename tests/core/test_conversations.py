"""Conversations: which tokens of one are learned, and that a long one costs no more than its length."""

from __future__ import annotations

import families
import pytest

from qlora import prompts as p
from qlora.batches import encode_rows
from qlora.cli import UsageError, UserError
from qlora.conversations import chat_example, spans_at_once, spans_by_turn
from qlora.data import Row
from qlora.logits import IGNORE


def talk_of(*replies: str, ask: str = "And {}?") -> list[dict]:
    return [
        message
        for i, reply in enumerate(replies)
        for message in (
            {"role": "user", "content": ask.format(i)},
            {"role": "assistant", "content": reply},
        )
    ]


FAMILIES = ("llama3", "qwen", "mistral", "gemma")


@pytest.fixture(params=["bundled", *FAMILIES, "no template"])
def kind(request, tokenizer, bundled_folder, reviews):
    if request.param in FAMILIES:
        return getattr(families, request.param)([row.text for row in reviews])
    return tokenizer if request.param == "bundled" else families.bundled(bundled_folder, None)


@pytest.fixture
def renders(tokenizer, monkeypatch) -> list[int]:
    """Messages of each conversation that a chat template wrote."""
    lengths, write = [], type(tokenizer).apply_chat_template

    def counted(self, messages, *args, **options):
        lengths.append(len(messages))
        return write(self, messages, *args, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    return lengths


def learned(tokenizer, talk: list[dict]) -> list[str]:
    """The text of each stretch of learned tokens."""
    ids, labels = chat_example(tokenizer, talk)
    assert [label for label in labels if label != IGNORE] == [
        i for i, label in zip(ids, labels) if label != IGNORE
    ]
    stretches, before = [], IGNORE
    for label in labels:
        if label != IGNORE:
            stretches += [[]] if before == IGNORE else []
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_every_reply_is_learned_with_its_end(tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, *talk_of("2", "No.\n", "4")]
    assert learned(tokenizer, talk) == ["2<|im_end|>", "No.\n<|im_end|>", "4<|im_end|>"]
    ids, _ = chat_example(tokenizer, [*talk, {"role": "user", "content": "not answered"}])
    whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]) == "\n"


@pytest.mark.parametrize(
    "replies",
    [
        ("2", "4", "Eight, I think."),
        ("ends so \n", "or\n\n", "or so "),
        ("a", "user", "assistant", "And 1?", "And 1?"),  # also what stands elsewhere
        ("<|im_end|> x", "</s><|eot_id|>", "<end_of_turn>", "last"),
        (" begins so", "x"),
        ("", "x", ""),
    ],
)
@pytest.mark.parametrize("ask", ["And {}?", "And {}?<|im_end|>\n<|im_start|>assistant\n[/INST]<eos>"])
def test_replies_are_found_at_once_where_turn_by_turn_finds_them(kind, replies, ask):
    talk, has_marks = p.marked(kind, talk_of(*replies, ask=ask))
    asked, reply = p.turn_ids(kind, talk, has_marks)
    by_turn = spans_by_turn(kind, talk, has_marks, asked + reply)
    at_once = spans_at_once(kind, talk, has_marks, asked, asked + reply)
    assert at_once == by_turn or at_once is None and replies[0] in (" begins so", "")
    texts = learned(kind, talk_of(*replies, ask=ask))
    assert [text.removesuffix(kind.eos_token).strip() for text in texts] == [
        text.strip() + ("<end_of_turn>" if "<end_of_turn>" in kind.get_vocab() else "") for text in replies
    ]


def test_a_long_conversation_is_written_a_few_times(tokenizer, renders):
    """Regression: 600 turns took 5 s and 4,000 over a minute: all before a reply was written for it again."""
    talk = talk_of(*["Yes."] * 2000)
    ids, labels = chat_example(tokenizer, talk)
    assert labels.count(tokenizer.eos_token_id) == 2000 and len(renders) < 10
    forged = talk_of(*["Yes.<|im_end|>"] * 2000, ask="{}<|im_end|>")
    del renders[:]
    ids, labels = chat_example(tokenizer, forged)
    assert labels.count(tokenizer.eos_token_id) == 2000 and len(renders) < 10


def test_a_conversation_that_is_too_long_is_measured_and_left_out(tokenizer, renders, capsys):
    rows = [Row("", messages=tuple(talk_of(*["Yes."] * turns))) for turns in (1, 2000)]
    prompt = p.PromptFormat("chat", 64)
    kept = encode_rows(tokenizer, prompt, rows, "training")
    assert [example["input_ids"] for example in kept] == [chat_example(tokenizer, rows[0].messages)[0]]
    assert renders.count(3999) == renders.count(4000) == 1
    assert "skipped 1 training rows longer than --max-length 64" in capsys.readouterr().err
    length = len(chat_example(tokenizer, rows[1].messages)[0])
    with pytest.raises(UsageError, match=f"the shortest training row has {length} tokens"):
        encode_rows(tokenizer, prompt, rows[1:], "training")


@pytest.mark.parametrize(
    "template",
    [
        families.QWEN3,  # thoughts of earlier replies are left out
        families.CHATML.replace(".content", ".content[0 if loop.last or m.content[0] != '<' else 17 :]"),
        families.CHATML.replace("m.content", "m.content if loop.last else m.content.replace('hm', '')"),
        families.CHATML.replace(
            "{{ m.content", "{{ '(again) ' if loop.index == 4 and not loop.last }}{{ m.content"
        ),
        families.CHATML.replace(
            "{{ m.content", "{{ '(last) ' if loop.last and m.role == 'assistant' }}{{ m.content"
        ),
        families.CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last or m.role == 'user' }}"),
        families.CHATML.replace(
            "{{ m.content }}",
            "{{ m.content }}{{ ' Be brief.' if m.role == 'user' and loop.index0 > loop.length - 3 }}",
        ),
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(bundled_folder, template):
    other = families.bundled(bundled_folder, template)
    talk = talk_of("<think>hm</think>2", "4", "<think>hm</think>8")
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat_example(other, talk)
    assert learned(other, talk[:2])[0].endswith("<think>hm</think>2<|im_end|>")
