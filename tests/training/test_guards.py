"""Each guard, on a healthy run and on a run with its bug planted."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora.hardware import detect
from qlora.loading import load_base
from qlora.logits import loss_at_labels
from qlora.training import guards as g

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]),
    "labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, 11, 12]]),
}
EXAMPLES = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}]


def lora_model(folder, precision="nf4"):
    base = load_base(str(folder), precision, detect())
    loss_at_labels(base.model)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(base.model, config)


@pytest.fixture
def model(tiny_folder):
    return lora_model(tiny_folder)


def step(model, rate=0.01):
    model.train()
    model(**BATCH).loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    optimizer.step()
    optimizer.zero_grad()


def fires(name):
    return pytest.raises(g.GuardError, match=f"guard '{name}'")


def test_all_labels_masked():
    g.labels_present(g.Guards(), EXAMPLES)
    with fires("labels_present"):
        g.labels_present(g.Guards(), EXAMPLES + [{"input_ids": [5, 6], "labels": [-100, -100]}])


def test_end_token_masked():
    # pad = eos and labels masked by token id: the model never learns to stop (unsloth#416,
    # LLaMA-Factory#7943)
    g.end_supervised(g.Guards(), EXAMPLES, {2})
    by_id = [
        {"input_ids": e["input_ids"], "labels": [-100 if i == 2 else i for i in e["labels"]]}
        for e in EXAMPLES
    ]
    with fires("end_supervised"):
        g.end_supervised(g.Guards(), by_id, {2})


def test_frozen_base_written_to(model):
    before = g.frozen_hash(model)
    step(model)
    g.base_unchanged(g.Guards(), before, model)  # training moves adapters only
    weight = model.get_base_model().model.layers[1].mlp.gate_proj.weight
    weight.data.view(torch.uint8).flatten()[7] ^= 1  # one bit
    with fires("base_unchanged"):
        g.base_unchanged(g.Guards(), before, model)


def test_adapter_not_zero_at_start(model):
    g.starts_as_base(g.Guards(), model, BATCH["input_ids"], nullcontext, exact=True)
    model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight.data.fill_(0.1)
    with fires("starts_as_base"):
        g.starts_as_base(g.Guards(), model, BATCH["input_ids"], nullcontext, exact=True)


def test_evaluation_repacks_weights(tiny_folder, model):
    # bitsandbytes 0.50.2 on AVX512-BF16: the first evaluation repacks Linear4bit in place, gradients are
    # wrong from then on
    g.nothing_repacked(g.Guards(), model, BATCH, nullcontext)
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # undo what load_base does
    from bitsandbytes.nn.modules import has_avx512bf16

    if has_avx512bf16():
        with fires("nothing_repacked"):
            g.nothing_repacked(g.Guards(), model, BATCH, nullcontext)
    else:  # no such kernel on this processor: plant its mark
        layers[0].weight.quant_state.packing_format_for_cpu = True
        with fires("nothing_repacked"):
            g.nothing_repacked(g.Guards(), model, BATCH, nullcontext)


def test_evaluation_changes_gradients(model, monkeypatch):
    # the same, seen by its effect: something in an evaluation writes into the model
    real = g.last_logits

    def spoiling(m, *rest):
        m.get_base_model().model.layers[0].input_layernorm.weight.data.mul_(1.5)
        return real(m, *rest)

    monkeypatch.setattr(g, "last_logits", spoiling)
    with fires("nothing_repacked"):
        g.nothing_repacked(g.Guards(), model, BATCH, nullcontext)


def test_loss_shortcut_misses_logit_scaling(model):
    # Gemma and Cohere cap or scale logits in their own forward; a shortcut around that forward would train on
    # another loss
    guards = g.Guards()
    g.loss_is_models_own(guards, model, BATCH, nullcontext)
    assert guards.results[0]["passed"]
    lm = model.get_base_model()
    real = lm.forward

    def scaled(input_ids=None, labels=None, **kwargs):
        out = real(input_ids=input_ids, labels=labels, **kwargs)
        if labels is None:
            out.logits = 50 * out.logits
        return out

    lm.forward = scaled
    with fires("loss_is_models_own"):
        g.loss_is_models_own(g.Guards(), model, BATCH, nullcontext)


def test_matrix_without_gradient(model):
    step(model)
    model(**BATCH).loss.backward()
    g.all_matrices_learn(g.Guards(), model)
    # alpaca-lora saved adapters for months in which nothing had been learned
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad = None
    with fires("all_matrices_learn"):
        g.all_matrices_learn(g.Guards(), model)


def test_b_stays_zero(model):
    step(model, rate=0.0)
    model(**BATCH).loss.backward()
    with fires("all_matrices_learn"):
        g.all_matrices_learn(g.Guards(), model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_not_finite(value):
    g.check_step(g.Guards(), {"loss": 1.0}, 3, scaled=False)
    with pytest.raises(
        g.GuardError, match="loss is .* at step 3; start again with --overwrite and a lower --learning-rate"
    ):
        g.check_step(g.Guards(), {"loss": value}, 3, scaled=False)


def test_adapter_on_disk_is_another(model, tmp_path):
    step(model, rate=1.0)
    model.save_pretrained(tmp_path)
    g.reloads_same(g.Guards(), model, tmp_path, BATCH["input_ids"], nullcontext)
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    with fires("reloads_same"):
        g.reloads_same(g.Guards(), model, tmp_path, BATCH["input_ids"], nullcontext)
