"""The CPU's fast path does the same mathematics as PEFT and torch."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import fast
from qlora.hardware import detect
from qlora.loading import load_base
from qlora.logits import loss_at_labels

bf16 = pytest.mark.skipif(
    detect().dtype != torch.bfloat16 or detect().device != "cpu", reason="the fast path is for CPUs with bf16"
)
BATCH = {"input_ids": torch.arange(5, 45).view(2, 20), "labels": torch.full((2, 20), -100)}
BATCH["labels"][:, -2:] = 9
SMALL_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_LLAMA |= {"vocab_size": 100}


def test_lora_function_has_the_formulas_gradients():
    torch.manual_seed(0)
    x, w, a, b = (
        torch.randn(*s, dtype=torch.float64, requires_grad=g)
        for s, g in (((6, 5), True), ((7, 5), False), ((2, 5), True), ((7, 2), True))
    )
    bias = torch.randn(7, dtype=torch.float64)
    # The function returns fp32 gradients for its fp32 masters, so it is compared, not gradcheck-ed
    y = fast.LoraLinear.apply(x, w, bias, a, b, 1.7)
    plain = F.linear(x, w, bias) + 1.7 * (x @ a.T) @ b.T
    torch.testing.assert_close(y, plain)
    up = torch.randn_like(y)
    for mine, reference in zip(
        torch.autograd.grad(y, (x, a, b), up), torch.autograd.grad(plain, (x, a, b), up)
    ):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
def test_attention_equals_torchs(heads, groups):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 8, requires_grad=True) for n in (heads, groups, groups))
    bias = fast.causal_bias(heads // groups, 9, torch.float32)
    mine = fast.CausalAttention.apply(q, k, v, bias, 8**-0.5)
    reference = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    up = torch.randn_like(mine)
    for a, b in zip(torch.autograd.grad(mine, (q, k, v), up), torch.autograd.grad(reference, (q, k, v), up)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_norm_and_gate_equal_torchs():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 16, requires_grad=True), torch.randn(16)
    mine = fast.RMSNorm.apply(x, weight, 1e-5)
    reference = F.rms_norm(x, (16,), weight, 1e-5)
    gate, up = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    for a, b, inputs in (
        (mine, reference, (x,)),
        (fast.SwiGLU.apply(gate, up), F.silu(gate) * up, (gate, up)),
    ):
        torch.testing.assert_close(a, b)
        upstream = torch.randn_like(a)
        torch.testing.assert_close(
            torch.autograd.grad(a, inputs, upstream), torch.autograd.grad(b, inputs, upstream)
        )


def gradients(model):
    model.train()
    model.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def lora(folder, precision, **options):
    base = load_base(str(folder), precision, detect())
    loss_at_labels(base.model)
    options.setdefault("target_modules", ["q_proj", "v_proj", "gate_proj", "down_proj"])
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **options)
    model = get_peft_model(base.model, config)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model


@bf16
def test_gradients_as_good_as_pefts(tiny_folder):
    import bitsandbytes as bnb

    model = lora(tiny_folder, "nf4")
    exact = lora(tiny_folder, "fp32")
    layers = dict(exact.named_modules())
    for name, m in model.named_modules():  # the same frozen values in fp32
        if isinstance(m, bnb.nn.Linear4bit):
            layers[name].weight.data = bnb.functional.dequantize_4bit(
                m.weight.data, m.weight.quant_state
            ).float()
    reference, pefts = gradients(exact), gradients(model)
    fast.speed_up_base(model.get_base_model())
    fast.speed_up_lora(model)
    mine = gradients(model)

    def error(found):
        return (
            torch.tensor([((found[n] - reference[n]).norm() / reference[n].norm()).item() for n in reference])
            .median()
            .item()
        )

    assert mine.keys() == reference.keys() and error(mine) < max(1.5 * error(pefts), 0.01)


@bf16
def test_switched_off_is_the_base_and_state_stays_pefts(tiny_folder):
    model = lora(tiny_folder, "nf4")
    names = list(model.state_dict())
    fast.speed_up_base(model.get_base_model())
    fast.speed_up_lora(model)
    assert list(model.state_dict()) == names
    base = load_base(str(tiny_folder), "nf4", detect()).model
    fast.speed_up_base(base)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(
            model(input_ids=BATCH["input_ids"]).logits, base(input_ids=BATCH["input_ids"]).logits
        )


@bf16
@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=["dropout", "dora"])
def test_what_it_does_not_know_goes_to_peft(tiny_folder, options, monkeypatch):
    model = lora(tiny_folder, "nf4", **options)
    fast.speed_up_lora(model)
    monkeypatch.setattr(
        fast.LoraLinear, "apply", lambda *a: pytest.fail("the fused function knows neither dropout nor DoRA")
    )
    assert gradients(model)


@bf16
def test_dense_values_are_bitsandbytes_own(tiny_folder):
    base = load_base(str(tiny_folder), "nf4", detect()).model
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    layer = base.model.layers[0].self_attn.q_proj
    before = layer(x)
    fast.speed_up_base(base)
    assert torch.equal(layer(x), before)


@bf16
def test_bf16_on_a_cpu_gets_the_fast_path_in_one_call(tiny_folder):
    model = lora(tiny_folder, "nf4")
    words = fast.make_fast(model)
    # 2 layers x (4 of the attention + 3 of the MLP); 2 x (2 x 64 x 64 + 2 x 32 x 64 + 3 x 64 x 128) x 2 bytes
    assert "14 4-bit matrices dequantized once (0 MB more)" in words and "LoRA fused" in words
    layer = model.get_base_model().model.layers[0]
    assert layer.self_attn.k_proj.dequantized.dtype == torch.bfloat16
    assert "forward" in vars(layer.self_attn.q_proj), "the layers with LoRA are replaced, too"
    assert gradients(model)


def test_other_dtypes_keep_the_libraries_own_kernels(tiny_folder):
    model = lora(tiny_folder, "fp32")
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert fast.make_fast(model) == "the libraries' own"
    lm = "base_model.model"  # its loss is made at the labelled positions on every device
    after = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert {n for n in after if after[n] != before[n]} <= {lm}


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
