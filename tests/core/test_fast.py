"""What is changed in a loaded model's forward, by device."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import fast
from qlora.hardware import detect
from qlora.loading import load_base

SMALL_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_LLAMA |= {"vocab_size": 100}


@pytest.mark.parametrize("lane", ["fp32", "libraries"])
def test_four_bit_layers_multiply_with_their_own_values(tiny_folder, lane):
    model = load_base(str(tiny_folder), "nf4", detect(lane="fp32")).model
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(3, 64)
    before = layer(x)
    fast.make_fast(model, lane)
    assert layer.dequantized.dtype == torch.float32
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)


def test_an_unquantized_base_is_not_held_twice():
    model = LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA)).eval()
    ids = torch.arange(5, 25).view(2, 10)
    before = model(ids).logits
    assert fast.make_fast(model).startswith("fp32 products")
    layer = model.model.layers[1].mlp.up_proj
    group = model.cpu_decoder.layers[1].gate_up
    assert layer.weight.untyped_storage().data_ptr() == group.matrix.untyped_storage().data_ptr()
    torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.parametrize("heads, groups, queries", [(4, 4, 6), (6, 2, 6), (6, 2, 1), (8, 1, 1)])
def test_repeated_keys_attend_as_transformers_does(heads, groups, queries):
    from types import SimpleNamespace

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 8) for n, length in ((heads, queries), (groups, 6), (groups, 6)))
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    mask = torch.rand(2, 1, queries, 6) > 0.3
    mask[..., 0] = True
    for given in (None, mask):
        mine, _ = fast.repeated_keys_attention(module, q, k, v, given, scaling=0.3)
        torch.testing.assert_close(mine, sdpa_attention_forward(module, q, k, v, given, scaling=0.3)[0])


def test_a_gpu_without_flash_attention_is_never_asked_for_grouped_heads(monkeypatch):
    # On compute capability 7.5 `enable_gqa` leaves torch its plain kernel, which keeps the attention matrix.
    asked, plain = [], F.scaled_dot_product_attention

    def sdpa(*args, **kwargs):
        asked.append(kwargs.get("enable_gqa", False))
        return plain(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    config = LlamaConfig(**SMALL_LLAMA, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(5, 25).view(2, 10)
    before = model(ids).logits
    assert asked == [True, True]
    assert "keys repeated" in fast.repeat_keys(model)
    asked.clear()
    torch.testing.assert_close(model(ids).logits, before)
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)  # token by token
    assert asked and not any(asked)


@pytest.mark.parametrize("capability, kernels", [((7, 5), "keys repeated"), ((8, 6), "the libraries' own")])
def test_make_fast_asks_the_card(monkeypatch, capability, kernels):
    model = LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA, num_key_value_heads=2)).to(torch.float16)
    monkeypatch.setattr(LlamaForCausalLM, "device", property(lambda self: torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast.make_fast(model).startswith(kernels)


@pytest.mark.parametrize(
    "capability, dtype, has",
    [
        ((7, 5), "float16", False),
        ((8, 0), "bfloat16", True),
        ((9, 0), "float16", True),
        ((8, 9), "float32", False),
    ],
)
def test_flash_attention_by_capability_and_dtype(capability, dtype, has):
    assert fast.has_flash(capability, getattr(torch, dtype)) is has
