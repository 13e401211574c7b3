"""Tests of the exercises of lesson 5: a training step."""

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F

BUNDLED = "smollm2-135m"
# (outputs, inputs) of the seven matrices in one of the bundled model's 30 layers
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


@cache
def tokens():
    """(prompt, reply, id that is pad and end token) of a real row, as the project makes them."""
    from transformers import AutoTokenizer

    from config import SENTIMENT_ANSWERS
    from qlora.prompts import answer_ids, choose_format, sentiment_prompt
    from qlora.sources import locate

    tokenizer = AutoTokenizer.from_pretrained(locate(BUNDLED)[0])
    asked = choose_format("sentiment", "labels", SENTIMENT_ANSWERS, 96)
    prompt = sentiment_prompt(tokenizer, asked, "A warm, funny film.")
    return prompt, answer_ids(tokenizer, asked, 1), tokenizer.pad_token_id


def test_lesson5_1_a_row_by_hand(lesson):
    ids, labels = lesson.padded([5, 6], [7, 2], 6, pad_id=0)
    assert ids == [5, 6, 7, 2, 0, 0], "prompt, reply, then padding up to `length`"
    assert labels[:2] == [-100, -100], "the prompt is only read: mask it"
    assert labels[2:4] == [7, 2], "labels stand where their input ids stand: the library shifts, not you"
    assert labels[4:] == [-100, -100], "padding teaches nothing: mask it"


def test_lesson5_1_pad_and_end_are_one_token(lesson):
    _, labels = lesson.padded([5, 2, 6], [7, 2], 7, pad_id=2)
    assert labels[4] == 2, "the reply's end token is lost: the model would never learn to stop"
    assert labels[:3] == [-100] * 3 and labels[5:] == [-100] * 2, "an end token in the prompt is only read"


def test_lesson5_1_a_real_row(lesson):
    from qlora.batches import collate

    prompt, reply, pad = tokens()
    assert reply[-1] == pad, "in the bundled model pad and end are one token"
    ids, labels = lesson.padded(prompt, reply, 64, pad)
    row = {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
    wanted = collate([row], pad, multiple=64)
    assert ids == wanted["input_ids"][0].tolist()
    assert labels == wanted["labels"][0].tolist(), "not what the project's own collate() makes"


def random_row():
    torch.manual_seed(5)
    labels = torch.randint(0, 11, (9,))
    labels[:4], labels[7] = -100, -100
    return torch.randn(9, 11) * 3, labels


def test_lesson5_2_a_coin_toss(lesson):
    found = lesson.loss(torch.zeros(3, 2), torch.tensor([-100, 1, -100]))
    assert abs(float(found) - 0.6931) < 1e-3, "one label counts, and it has probability 1/2: natural ln 2"


def test_lesson5_2_equals_torch(lesson):
    logits, labels = random_row()
    wanted = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
    found = float(lesson.loss(logits, labels))
    assert abs(found - wanted) < 1e-4, f"torch says {wanted:.4f}: shift? mask left out of the count, too?"


def test_lesson5_2_large_logits(lesson):
    logits, labels = random_row()
    found = float(lesson.loss(logits + 1000, labels))
    assert abs(found - float(lesson.loss(logits, labels))) < 1e-2, (
        "adding the same number to all logits changes no probability; exp(1000) overflows"
    )


def test_lesson5_2_accumulated_batches(lesson):
    found = lesson.loss_of_update([(1.0, 2), (3.0, 8)])
    assert abs(found - 2.6) < 1e-9, "2 labels of loss 1 and 8 of loss 3 are 26 in all, over 10 labels"


def test_lesson5_3_one_matrix(lesson):
    found = lesson.trained_bytes([(3072, 1024)], rank=16)
    assert found["adapters"] == 4 * 65_536, "A is (16, 1024), B is (3072, 16), each number 4 bytes"
    assert found["gradients"] == found["adapters"], "one gradient for each trained weight"
    assert found["optimizer"] == 2 * found["adapters"], "AdamW keeps two numbers for each trained weight"


def job():
    """A small one on a T4."""
    from qlora.memory.step import Job

    return Job(device="cuda", capability=(7, 5), length=64)


@cache
def peaks() -> list[dict]:
    """The project's own prediction for the bundled model with 1 and 2 rows."""
    from qlora.memory.step import predict, predict_training
    from qlora.shapes import model_config

    config = model_config(BUNDLED)[0]
    return [predict(predict_training, config, replace(job(), batch_size=rows)) for rows in (1, 2)]


def test_lesson5_3_the_plan_of_the_bundled_model(lesson):
    found, parts = lesson.trained_bytes(LAYER * 30, rank=16), peaks()[0]
    assert found["adapters"] == parts["adapters"], f"the plan counts {parts['adapters']:,} bytes of A and B"
    # torch's AdamW also keeps a step counter for each matrix, in a block of 512 bytes on a GPU
    assert abs(found["optimizer"] / parts["optimizer"] - 1) < 0.01, "not what torch's AdamW holds"


def test_lesson5_3_rows_that_fit(lesson):
    assert lesson.largest_batch(5.0, 6.0, 10.0) == 6, "4 GB are paid once, then 1 GB a row"
    assert lesson.largest_batch(5.0, 6.0, 10.9) == 6, "there are no parts of rows"
    assert lesson.largest_batch(5.0, 6.0, 4.5) == 0, "not even one row fits"


def test_lesson5_3_rows_that_fit_by_the_plan(lesson):
    from qlora.memory.plan import judge

    one, two = (each["peak"] for each in peaks())
    for capacity in (1e9, 4e9, 16e9):
        wanted = judge(replace(job(), batch_size=1), capacity, one, two)[0]["largest_batch"]
        assert lesson.largest_batch(one / 1e9, two / 1e9, capacity / 1e9) == wanted, f"the plan says {wanted}"
