from __future__ import annotations

import functools

import pytest
import torch

from config import BUNDLED
from qlora.generation import next_distribution
from qlora.sources import locate


def layer(out: int, wide: int, rank: int, seed: int = 0):
    """weight (out, wide), a (rank, wide), b (out, rank), all random"""
    torch.manual_seed(seed)
    return torch.randn(out, wide), torch.randn(rank, wide), torch.randn(out, rank)


def peft_layer(weight, parts, combine=None):
    """A linear layer with PEFT's LoRA adapters from (a, b, scale, weight), and their combination."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    for i, (a, _, scale, _) in enumerate(parts):
        config = LoraConfig(r=len(a), lora_alpha=scale * len(a), target_modules=["0"])
        if i == 0:
            model = get_peft_model(model, config, adapter_name="part0")
        else:
            model.add_adapter(f"part{i}", config)
    lora = model.base_model.model[0]
    for i, (a, b, *_) in enumerate(parts):
        lora.lora_A[f"part{i}"].weight.data, lora.lora_B[f"part{i}"].weight.data = a.clone(), b.clone()
    if combine:
        names = [f"part{i}" for i in range(len(parts))]
        model.add_weighted_adapter(names, [p[3] for p in parts], "all", combination_type=combine)
    return lora


def test_lesson7_1_a_merge_by_hand(lesson):
    original, dequantized = torch.full((1, 2), 8.0).bfloat16(), torch.tensor([[1.0, 2.0]]).bfloat16()
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    found = lesson.merged(original, dequantized, a, b, 4, torch.float32)
    assert found.tolist() != [[9.0, 8.5]], "the adapter never saw the original weights"
    assert found.tolist() != [[1.5, 2.25]], "where is alpha / r?"
    assert found.tolist() == [[2.0, 2.5]], "1 + 4/2 * 0.5 and 2 + 4/2 * 0.25"


def test_lesson7_1_a_small_update_is_not_lost_before_the_end(lesson):
    weight = torch.ones(1, 1).bfloat16()
    found = lesson.merged(weight, weight, torch.ones(1, 1), torch.full((1, 1), 0.001), 1, torch.float16)
    assert found.dtype == torch.float16
    assert found.item() > 1, "bf16 has no number between 1 and 1.0078: add in fp32, round at the end"


def test_lesson7_1_it_is_the_merge_of_peft(lesson):
    weight, a, b = layer(6, 8, 2)
    lora = peft_layer(weight, [(a, b, 3.0, 1.0)])
    lora.merge()
    found = lesson.merged(torch.zeros(6, 8), weight, a, b, 6, torch.float32)
    assert torch.allclose(found, lora.base_layer.weight, atol=1e-5), "PEFT's merge has other values"


def test_lesson7_1_what_a_type_leaves_of_an_update(lesson):
    one, small = torch.ones(4), torch.full((4,), 0.001)
    kept = {t: lesson.left_of_update(one, small, t) for t in (torch.float32, torch.float16, torch.bfloat16)}
    assert kept[torch.bfloat16] == 0, "half a step of bf16 at 1 is 0.0039: 0.001 is rounded away"
    assert kept[torch.float16] == pytest.approx(1 / 1024 / 0.001), "the nearest step of fp16 at 1 is 1/1024"
    assert kept[torch.float32] == pytest.approx(1, abs=1e-3)


def test_lesson7_1_errors_of_the_weight_itself_are_no_loss(lesson):
    weight, update = torch.tensor([1.003]), torch.tensor([0.25])
    found = lesson.left_of_update(weight, update, torch.bfloat16)
    assert found == 1, "1.003 is 1 in bf16 with or without an update: compare with the rounded weight"


def test_lesson7_1_a_lost_half_counts_by_its_size(lesson):
    found = lesson.left_of_update(torch.ones(2), torch.tensor([0.001, 0.5]), torch.bfloat16)
    assert found == pytest.approx(0.25 / (0.25 + 1e-6)), "the slope: large entries count more than small ones"


def test_lesson7_2_the_sum_is_exact_with_different_ranks(lesson):
    _, a1, b1 = layer(6, 8, 2, seed=1)
    _, a2, b2 = layer(6, 8, 3, seed=2)
    A, B = lesson.cat([(a1, b1, 2.0, 0.7), (a2, b2, 0.5, -0.3)])
    assert (A.shape, B.shape) == ((5, 8), (6, 5)), "the ranks add up: A is (r1 + r2, in), B is (out, r1 + r2)"
    wanted = 0.7 * 2.0 * b1 @ a1 - 0.3 * 0.5 * b2 @ a2
    assert torch.allclose(B @ A, wanted, atol=1e-5), "B @ A has to be the sum of weight * scale * b @ a"


def test_lesson7_2_it_is_the_combination_of_peft(lesson):
    weight, a1, b1 = layer(6, 8, 2, seed=3)
    _, a2, b2 = layer(6, 8, 3, seed=4)
    parts = [(a1, b1, 2.0, 0.5), (a2, b2, 1.0, 0.5)]
    A, B = lesson.cat(parts)
    theirs = peft_layer(weight, parts, "cat").get_delta_weight("all")
    assert torch.allclose(B @ A, theirs, atol=1e-5), "PEFT's `cat` is another sum"


@functools.lru_cache
def logits_of_the_bundled_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate(BUNDLED)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(**tokenizer("The best film of all time is", return_tensors="pt")).logits[0, -1]


def close(found, wanted) -> bool:
    return torch.allclose(found.double(), torch.as_tensor(wanted).double(), atol=1e-5)


def test_lesson7_3_three_tokens_by_hand(lesson):
    logits = torch.tensor([0.5, 0.2, 0.3]).log()
    assert close(lesson.next_probabilities(logits, 1.0, 1.0), [0.5, 0.2, 0.3])
    found = lesson.next_probabilities(logits, 1.0, 0.7)
    assert close(found.sum(), 1.0), "what is kept has to add up to 1 again"
    assert close(found, [0.625, 0, 0.375]), "0.5 and 0.3 reach 0.7; each token stays in its place"
    assert close(lesson.next_probabilities(logits, 1.0, 0.1), [1, 0, 0]), "one token always stays"


def test_lesson7_3_temperature_comes_first(lesson):
    # At temperature 0.5 the probabilities are as the squares: 25, 4 and 9 of 38
    found = lesson.next_probabilities(torch.tensor([0.5, 0.2, 0.3]).log(), 0.5, 0.6)
    assert close(found, [1, 0, 0]), "25/38 reaches 0.6 alone: temperature changes what top-p keeps"


def test_lesson7_3_temperature_0_is_greedy(lesson):
    assert close(lesson.next_probabilities(torch.tensor([1.0, 3.0, 2.0]), 0, 0.9), [0, 1, 0])


def test_lesson7_3_the_bundled_models_next_token(lesson):
    logits = logits_of_the_bundled_model()
    for temperature, top_p in ((0.7, 0.9), (1.0, 0.5), (1.5, 0.8)):
        found = lesson.next_probabilities(logits, temperature, top_p)
        wanted = next_distribution(logits, temperature, top_p=top_p)
        assert close(found, wanted), (
            f"temperature {temperature}, top-p {top_p}: not what generate() draws from"
        )
