"""Scores against hand-worked numbers and against the plain way of computing them."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from qlora import evaluation as e
from qlora.data import Row
from qlora.logits import loss_at_labels
from qlora.measures import wilson
from qlora.prompts import PromptFormat
from qlora.sources import locate
from qlora.training.before_after import BeforeAfter, bag_of_words, flips


@pytest.fixture(scope="module")
def model(tiny_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def log_prob(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def test_wilson_by_hand():
    # p = 0.9, n = 100, z = 1.96: centre (0.9 + 0.019208) / 1.038416, half-width 1.96 * sqrt(0.0009 +
    # 0.00009604) / 1.038416
    low, high = wilson(90, 100)
    assert low == pytest.approx(0.8852 - 0.0596, abs=1e-3) and high == pytest.approx(
        0.8852 + 0.0596, abs=1e-3
    )
    assert wilson(10, 10)[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "answers",
    [[[11, 2], [12, 2]], [[11, 12, 2], [11, 13, 2], [14, 2]]],
    ids=["one token tells", "shared first token"],
)
def test_label_scores_equal_plain_forward_passes(model, answers):
    # 40 tokens in common (system message, examples): cached once, and it must not change a score
    prompts = [list(range(20, 60)) + [100 + i] * (1 + 3 * i) for i in range(5)]
    scores = e.score_labels(model, prompts, answers, nullcontext)
    first_token_only = len({a[0] for a in answers}) == len(answers)
    with torch.no_grad():
        plain = [[log_prob(model, p, a[:1] if first_token_only else a) for a in answers] for p in prompts]
    np.testing.assert_allclose(scores, plain, atol=2e-4)


@pytest.mark.parametrize("answers, told", [([[11, 2], [12, 2]], True), ([[11, 12], [11, 13]], False)])
def test_loss_and_labels_of_one_pass_equal_those_of_two(model, answers, told, monkeypatch):
    prompts = [[30 + i] * (3 + 5 * i) for i in range(4)]
    rows = [
        (prompt + answers[i % 2], [-100] * len(prompt) + answers[i % 2]) for i, prompt in enumerate(prompts)
    ]
    examples = [dict(zip(("input_ids", "labels"), row)) for row in rows]
    monkeypatch.setitem(e.BATCH_TOKENS, "cpu", 30)
    loss, said = e.loss_and_labels(model, examples, answers, nullcontext)
    with torch.no_grad():
        plain = [-log_prob(model, prompt, answers[i % 2]) for i, prompt in enumerate(prompts)]
    assert loss == pytest.approx(sum(plain) / 8, abs=1e-4)
    scores = e.score_labels(model, prompts, answers, nullcontext)
    assert said == (scores.argmax(1).tolist() if told else None)  # None: the first token says too little


def test_batching_does_not_change_scores(model, monkeypatch):
    prompts = [[30] * n for n in (5, 50, 9, 33)]
    whole = e.score_labels(model, prompts, [[11], [12]], nullcontext)
    monkeypatch.setitem(e.BATCH_TOKENS, "cpu", 20)
    np.testing.assert_allclose(e.score_labels(model, prompts, [[11], [12]], nullcontext), whole, atol=1e-4)


def test_perplexity_by_the_models_own_loss(model):
    examples = [{"input_ids": list(range(10, 10 + n)), "labels": list(range(10, 10 + n))} for n in (6, 9)]
    with torch.no_grad():
        total = sum(
            model(input_ids=torch.tensor([x["input_ids"]]), labels=torch.tensor([x["labels"]])).loss.item()
            * (len(x["labels"]) - 1)
            for x in examples
        )
    loss_at_labels(model)
    found = e.perplexity(model, examples, nullcontext)
    assert found["tokens"] == 13 and found["perplexity"] == pytest.approx(math.exp(total / 13), rel=1e-4)


def test_accuracy_and_confusion_by_hand():
    result = e.accuracy_report([0, 1, 1, 0], [0, 1, 0, 0], ("negative", "positive"))
    assert result["accuracy"] == 0.75
    assert result["confusion"] == {
        "negative": {"negative": 2, "positive": 1},
        "positive": {"negative": 0, "positive": 1},
    }


def test_flips_largest_change_of_mind_first():
    before = np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    after = np.log([[0.2, 0.8], [0.1, 0.9], [0.9, 0.1], [0.2, 0.8]])
    # truth: rows 0 and 1 were wrong and are right now (0 swung further), row 2 was right and is wrong, row 3
    # stays right
    assert flips(before, after, [1, 1, 1, 1]) == {"fixed": [0, 1], "broken": [2]}


def test_bag_of_words_learns_words():
    train = [Row(f"great film {i}", 1) for i in range(10)] + [Row(f"awful film {i}", 0) for i in range(10)]
    assert bag_of_words(train, [Row("a great thing", 1), Row("an awful thing", 0)]) == [1, 0]


def test_scores_are_those_of_these_weights(tiny_folder, tokenizer, tmp_path):
    # A plain folder has no commit: training anew into the same folder must not be taken for the same base
    import shutil
    from types import SimpleNamespace

    folder = shutil.copytree(tiny_folder, tmp_path / "model")

    def fingerprint(label: int) -> str:
        base = SimpleNamespace(tokenizer=tokenizer, info=SimpleNamespace(revision=locate(str(folder))[2]))
        prompt = PromptFormat("sentiment", 64, answers=("no", "yes"))
        return BeforeAfter(base, prompt, [Row("b", 1)])._fingerprint([Row("a", label)])

    before = fingerprint(0)
    assert before == fingerprint(0) != fingerprint(1)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert before != fingerprint(0)
