"""What is changed in a loaded model's forward, by device."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import fast
from qlora.generation import generate
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


def with_adapters(folder, **settings):
    """The tiny model at NF4 with two adapters whose B is not zero, in evaluation mode."""
    model = load_base(str(folder), "nf4", detect(lane="fp32")).model
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **settings))
    model.add_adapter("other", LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    fast.make_fast(model, "fp32")
    return model.eval()


def test_generating_multiplies_once_and_leaves_no_trace(tiny_folder):
    model, ids = with_adapters(tiny_folder), torch.arange(5, 25)[None]
    lora = [m for m in model.modules() if hasattr(m, "lora_A")]
    for name in ("default", "other"):
        model.set_adapter(name)
        before = model(ids).logits
        with fast.one_product(model), torch.no_grad():
            taken = [m for m in lora if "forward" in vars(m)]
            assert len(taken) == sum(name in m.lora_A for m in lora)
            torch.testing.assert_close(model(ids).logits, before.detach(), rtol=1e-4, atol=1e-5)
        assert not any("forward" in vars(m) for m in lora)
    calls = []
    for m in lora:
        for a in m.lora_A.values():
            a.register_forward_pre_hook(lambda *_: calls.append(1))
    text = generate(model, [[5, 6, 7]], 6, min_new_tokens=6)
    assert not calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "mergeable", lambda model: [])
        assert generate(model, [[5, 6, 7]], 6, min_new_tokens=6) == text
    assert calls
    with pytest.raises(RuntimeError), fast.one_product(model):
        raise RuntimeError  # as Ctrl-C would
    assert not any("forward" in vars(m) for m in lora)


def test_only_plain_adapters_that_are_switched_on_are_added_to_the_weights(tiny_folder, monkeypatch):
    model = with_adapters(tiny_folder)
    assert fast.mergeable(model)
    with model.disable_adapter():
        assert not fast.mergeable(model)
    model.base_model.set_adapter(["default", "other"])
    assert not fast.mergeable(model)
    model.set_adapter("default")
    lora = [m for m in model.modules() if hasattr(m, "lora_A")]
    monkeypatch.setattr(fast.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with fast.one_product(model):
        assert not any("forward" in vars(m) for m in lora)
    monkeypatch.undo()
    model.train()
    with fast.one_product(model):
        assert not any("forward" in vars(m) for m in lora)
    assert not fast.mergeable(with_adapters(tiny_folder, lora_dropout=0.1))
    sixteen = get_peft_model(
        load_base(str(tiny_folder), "bf16", detect(lane="libraries")).model,
        LoraConfig(r=4, target_modules="all-linear"),
    )
    assert not fast.mergeable(sixteen.eval())


@pytest.mark.parametrize("heads, groups, queries", [(4, 4, 6), (6, 2, 6), (6, 2, 1), (8, 1, 1)])
def test_repeated_keys_attend_as_transformers_does(heads, groups, queries):
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
