"""Tests of lesson 4's exercises: by hand, by torch, and by the bundled model's real weights."""

from __future__ import annotations

import functools

import torch

from qlora.hardware import detect
from qlora.lab.outline import describe, sum_up
from qlora.loading import load_base
from qlora.shapes import model_config, skeleton


@functools.cache
def bundled() -> torch.nn.Module:
    """The bundled model's embeddings and its first decoder layer."""
    model = load_base("smollm2-135m", "fp32", detect("fp32", "cpu", "fp32")).model
    model.model.layers = model.model.layers[:1]
    return model


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_lesson4_1_by_hand(lesson):
    queries, keys, values = torch.tensor([[[[0.0], [1.0]]], [[[1.0], [1.0]]], [[[2.0], [4.0]]]])
    found = lesson.attention(queries, keys, values)
    assert found[0, 0].item() == 2, "token 0 can see only itself"
    assert near(found, torch.tensor([[[2.0], [3.0]]])), "equal scores share equally: (2 + 4) / 2"
    # d = 4, the scores 4 and 0: divided by 2 they are 2 and 0, and e^2 / (e^2 + 1) = 0.8808
    queries = torch.tensor([[[0.0, 0, 0, 0], [1, 1, 1, 1]]])
    keys = torch.tensor([[[1.0, 1, 1, 1], [0, 0, 0, 0]]])
    shares = lesson.attention(queries, keys, torch.eye(4)[None, :2])[0, 1, :2]
    assert near(shares, torch.tensor([0.8808, 0.1192])), f"the scores are to be divided by sqrt(4): {shares}"


def test_lesson4_1_by_torch(lesson):
    q, k, v = random(6, 7, 8, seed=1), random(2, 7, 8, seed=2), random(2, 7, 8, seed=3)
    library = torch.nn.functional.scaled_dot_product_attention
    for kv, what in ((6, "as many keys as queries"), (2, "three heads for each of two keys")):
        a, b = (k, v) if kv == 2 else (random(6, 7, 8, seed=4), random(6, 7, 8, seed=5))
        right = library(q[None], a[None], b[None], is_causal=True, enable_gqa=True)[0]
        assert near(lesson.attention(q, a, b), right), f"torch's attention gives something else: {what}"


def test_lesson4_2_norm_by_hand(lesson):
    found = lesson.rms_norm(torch.tensor([[3.0, -4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    right = torch.tensor([[0.848528, -2.262742]])
    assert near(found, right), f"3 / sqrt((9 + 16) / 2) = 0.8485, and nothing is subtracted; not {found}"
    assert not lesson.rms_norm(torch.zeros(1, 2), torch.ones(2), 1e-5).any(), "without eps this is 0 / 0"
    # mean square 12.5e-6, with eps 22.5e-6, its root 0.0047434
    small = lesson.rms_norm(torch.tensor([[0.003, -0.004]]), torch.ones(2), 1e-5)
    assert near(small, torch.tensor([[0.632456, -0.843274]])), "eps is added before the root is taken"


@torch.no_grad()
def test_lesson4_2_a_real_layer(lesson):
    model = bundled()
    # Hidden states as the first layer really meets them: embeddings of tokens, small numbers.
    x = model.model.embed_tokens(torch.arange(1000, 1012))
    layer = model.model.layers[0]
    norm = layer.input_layernorm
    found = lesson.rms_norm(x, norm.weight, norm.variance_epsilon)
    assert near(found, norm(x)), "the bundled model's own norm gives something else"
    parts = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight)
    assert near(lesson.mlp(found, *parts), layer.mlp(norm(x))), "its own MLP gives something else"


def test_lesson4_3_counts(lesson):
    for name in ("llama-3.2-3b", "llama-3.1-8b", "smollm2-135m", "qwen3-0.6b"):
        config = model_config(name)[0]
        quantized, rest = lesson.weights_by_kind(config)
        sums = {row["kind"]: row["values"] for row in sum_up(describe(skeleton(config)))}
        head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        linear = sums["Linear"] - head  # the outline counts an untied head among the linear layers
        assert quantized == linear, f"{name}: {linear:,} numbers in the decoder layers' matrices"
        if name != "qwen3-0.6b":  # which has two more norms in each layer
            outside = skeleton(config).num_parameters() - linear
            assert rest == outside, f"{name}: {outside:,} numbers outside them, a tied head counted once"


def test_lesson4_3_gigabytes(lesson):
    sizes = {"llama-3.2-3b": (2.242, 3.607, 6.425), "llama-3.1-8b": (5.702, 9.081, 16.061)}
    for name, by_bits in sizes.items():
        config = model_config(name)[0]
        for bits, size in zip((4.127, 8, 16), by_bits, strict=True):
            found = lesson.gigabytes(config, bits)
            assert abs(found - size) < 0.002, f"{name} at {bits} bits: {size:.3f} GB, not {found:.3f}"
