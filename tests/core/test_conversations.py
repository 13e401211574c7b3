"""Conversations: which tokens of one are learned, and that a long one costs no more than its length."""

from __future__ import annotations

import families
import pytest

from qlora import prompts as p
from qlora.batches import encode_rows
from qlora.cli import UsageError
from qlora.conversations import chat_examples, examples_by_turn, spans_at_once
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
    ((ids, labels),) = chat_examples(tokenizer, talk)
    return stretches(tokenizer, ids, labels)


def stretches(tokenizer, ids: list[int], labels: list[int]) -> list[str]:
    assert [label for label in labels if label != IGNORE] == [
        i for i, label in zip(ids, labels) if label != IGNORE
    ]
    found, before = [], IGNORE
    for label in labels:
        if label != IGNORE:
            found += [[]] if before == IGNORE else []
            found[-1].append(label)
        before = label
    return [tokenizer.decode(stretch) for stretch in found]


def test_every_reply_is_learned_with_its_end(tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, *talk_of("2", "No.\n", "4")]
    assert learned(tokenizer, talk) == ["2<|im_end|>", "No.\n<|im_end|>", "4<|im_end|>"]
    ((ids, _),) = chat_examples(tokenizer, [*talk, {"role": "user", "content": "not answered"}])
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
    ((ids, labels),) = examples_by_turn(kind, talk, has_marks)
    at_once = spans_at_once(kind, talk, has_marks, asked, asked + reply)
    assert ids == asked + reply
    if at_once is None:
        assert replies[0] in (" begins so", "")
    else:
        found = [IGNORE] * len(asked) + reply
        for start, stop in at_once:
            found[start:stop] = ids[start:stop]
        assert found == labels
    texts = learned(kind, talk_of(*replies, ask=ask))
    assert [text.removesuffix(kind.eos_token).strip() for text in texts] == [
        text.strip() + ("<end_of_turn>" if "<end_of_turn>" in kind.get_vocab() else "") for text in replies
    ]


def test_a_long_conversation_is_written_a_few_times(tokenizer, renders):
    """Regression: 600 turns took 5 s and 4,000 over a minute: all before a reply was written for it again."""
    talk = talk_of(*["Yes."] * 2000)
    ((_, labels),) = chat_examples(tokenizer, talk)
    assert labels.count(tokenizer.eos_token_id) == 2000 and len(renders) < 10
    forged = talk_of(*["Yes.<|im_end|>"] * 2000, ask="{}<|im_end|>")
    del renders[:]
    ((_, labels),) = chat_examples(tokenizer, forged)
    assert labels.count(tokenizer.eos_token_id) == 2000 and len(renders) < 10


def test_a_conversation_that_is_too_long_is_measured_and_left_out(tokenizer, renders, capsys):
    rows = [Row("", messages=tuple(talk_of(*["Yes."] * turns))) for turns in (1, 2000)]
    prompt = p.PromptFormat("chat", 64)
    kept = encode_rows(tokenizer, prompt, rows, "training")
    assert [example["input_ids"] for example in kept] == [chat_examples(tokenizer, rows[0].messages)[0][0]]
    assert renders.count(3999) == renders.count(4000) == 1
    assert "skipped 1 training rows longer than --max-length 64" in capsys.readouterr().err
    length = len(chat_examples(tokenizer, rows[1].messages)[0][0])
    with pytest.raises(UsageError, match=f"the shortest training row has {length} tokens"):
        encode_rows(tokenizer, prompt, rows[1:], "training")


REWRITING = {
    "thoughts of earlier replies are left out": (families.QWEN3, 2),
    "their beginning is cut": (
        families.CHATML.replace(".content", ".content[0 if loop.last or m.content[0] != '<' else 17 :]"),
        2,
    ),
    "a word is taken out": (
        families.CHATML.replace("m.content", "m.content if loop.last else m.content.replace('hm', '')"),
        2,
    ),
    "a word is added": (
        families.CHATML.replace(
            "{{ m.content", "{{ '(again) ' if loop.index == 4 and not loop.last }}{{ m.content"
        ),
        2,
    ),
    "the last reply is marked": (
        families.CHATML.replace(
            "{{ m.content", "{{ '(last) ' if loop.last and m.role == 'assistant' }}{{ m.content"
        ),
        3,
    ),
    "only the last reply ends": (
        families.CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last or m.role == 'user' }}"),
        3,
    ),
    "the last question is extended": (
        families.CHATML.replace(
            "{{ m.content }}",
            "{{ m.content }}{{ ' Be brief.' if m.role == 'user' and loop.index0 > loop.length - 3 }}",
        ),
        3,
    ),
}


@pytest.mark.parametrize("template, count", REWRITING.values(), ids=REWRITING)
def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each_reply(
    bundled_folder, template, count
):
    """Such conversations were refused. A reply that stands unchanged in the next prompt is learned there."""
    other = families.bundled(bundled_folder, template)
    replies = ("<think>hm</think>2", "4", "<think>hm</think>8")
    talk = talk_of(*replies)
    examples = chat_examples(other, talk)
    assert len(examples) == count
    told = [text for example in examples for text in stretches(other, *example)]
    assert [text.removesuffix("<|im_end|>").replace("(last) ", "") for text in told] == list(replies)
    assert examples[-1][0] == sum(p.turn_ids(other, talk, False), [])
    for ids, labels in examples:  # each ends with a prompt as it is at run time, and the reply
        places = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        prompts = [p.render(other, talk[:i], True, "think" in talk[i]["content"]) for i in places]
        start = max(i for i in range(len(labels)) if labels[i] != IGNORE and labels[i - 1] == IGNORE)
        assert ids[:start] in prompts


def test_a_conversation_that_becomes_several_rows_is_named(bundled_folder, capsys):
    other = families.bundled(bundled_folder, families.QWEN3)
    rows = [Row("", messages=tuple(talk_of("<think>hm</think>2", "4")))]
    assert len(encode_rows(other, p.PromptFormat("chat", 128), rows, "training")) == 2
    assert "1 training conversations became 2 rows" in capsys.readouterr().err
