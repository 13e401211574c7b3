"""Tests of the exercises of lesson 2."""

import math
from functools import cache

import torch

from config import BUNDLED
from qlora.lab.activations import quantize_static
from qlora.lab.formats import decode_int8, encode_int8
from qlora.qat import q4_0


def test_lesson2_1_by_hand(lesson):
    found = lesson.losses(torch.zeros(3, 4), torch.tensor([0, 3, 1]))
    assert len(found) == 2, "three tokens: nothing is said about the first one"
    assert abs(found.sum().item() - 2 * math.log(4)) < 1e-5, "four tokens, all equally likely: p = 1/4"
    texts = [torch.tensor([math.log(2)]), torch.full((3,), math.log(8))]
    right = math.exp((math.log(2) + 3 * math.log(8)) / 4)
    assert abs(lesson.perplexity(texts) - right) < 1e-5, f"{right:.3f}: four tokens, one mean of their losses"


def test_lesson2_1_the_next_token(lesson):
    scores = torch.full((3, 5), -20.0)
    for place, after in enumerate((4, 2, 0)):
        scores[place, after] = 20.0  # a model that is sure: 4 comes after the first token, then 2
    assert lesson.losses(scores, torch.tensor([1, 4, 2])).max() < 1e-4, (
        "the scores at a place are about the next"
    )


@cache
def text_of_the_model():
    """(token ids, scores (tokens, 49152), the perplexity by transformers) of a sentence."""
    from qlora import hardware
    from qlora.loading import load_base

    base = load_base(BUNDLED, "fp32", hardware.detect("fp32", "cpu", "fp32"))
    ids = torch.tensor(base.tokenizer("The film was a complete waste of time.").input_ids)
    with torch.no_grad():
        out = base.model(ids[None], labels=ids[None])
    return ids, out.logits[0], out.loss.exp().item()


def test_lesson2_1_as_transformers_on_the_model_here(lesson):
    ids, scores, right = text_of_the_model()
    found = lesson.perplexity([lesson.losses(scores, ids)])
    assert abs(found / right - 1) < 1e-3, f"{found:.2f}; transformers says {right:.2f}"


def activations():
    """(6 tokens, 64 columns): a first token as large as the model's, and ordinary ones."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[0, 7] = -2352.0
    return x


def off(x, found):
    """|x - found| / |x| of each token"""
    return (x - found).norm(dim=1) / x.norm(dim=1)


def test_lesson2_2_a_scale_for_each_token(lesson):
    x = activations()
    found = lesson.int8_dynamic(x)
    torch.testing.assert_close(found, decode_int8(*encode_int8(x)), msg="not what bitsandbytes' int8 gives")
    assert off(x, found).max() < 0.02, "the first token must not touch the scales of the others"
    assert lesson.int8_dynamic(torch.zeros(2, 4)).tolist() == [[0.0] * 4] * 2, "a token of zeros"


def test_lesson2_2_one_scale_for_all(lesson):
    x = activations()
    for limit in (2352.0, 3.0):
        right = quantize_static(x, limit)
        torch.testing.assert_close(lesson.int8_static(x, limit), right, msg=f"with the limit {limit}")
    assert lesson.int8_static(torch.tensor([[5.0, -9.0]]), 3.0).tolist() == [[3.0, -3.0]], (
        "larger ones are cut"
    )
    assert off(x, lesson.int8_static(x, 2352.0))[1:].min() > 0.9, "a step of 18.5: the others become zeros"


def test_lesson2_3_numbers_and_slopes(lesson):
    weight = torch.tensor([0.31, -0.74, 1.2], requires_grad=True)
    found = lesson.straight_through(weight, lambda w: (w * 8).round() / 8)
    torch.testing.assert_close(
        found, torch.tensor([0.25, -0.75, 1.25]), msg="the numbers have to be rounded ones"
    )
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.0, 2.0, 3.0], (
        f"training sees {weight.grad}: it has to see what it would see without the rounding, 1, 2, 3"
    )


def test_lesson2_3_a_rounded_weight_learns(lesson):
    weight = torch.linspace(-1, 1, 32)[None].clone().requires_grad_()
    wanted = q4_0(torch.linspace(1, -1, 32)[None])
    for _ in range(200):
        (lesson.straight_through(weight, q4_0) - wanted).square().sum().backward()
        with torch.no_grad():
            weight -= 0.05 * weight.grad
        weight.grad = None
    apart = (q4_0(weight) - wanted).detach().abs().max().item()
    assert apart < 0.15, f"after 200 steps of training a weight in Q4_0 is {apart:.2f} from the wanted one"
