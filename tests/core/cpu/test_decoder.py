"""The CPU's decoder computes what transformers and PEFT do, and leaves to them what it does not know."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qlora import fast
from qlora.cli import UserError
from qlora.cpu import attach, kernels, plain
from qlora.cpu.lanes import DTYPES
from qlora.cpu.products import Group, Lora, Pool
from qlora.evaluation import perplexity, score_labels
from qlora.hardware import detect
from qlora.loading import load_base
from qlora.logits import last_logits, loss_at_labels

SIZES = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch(rows=3, tokens=150) -> dict:
    """Rows that begin alike and have labels at different places, padded at the end."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 100, (rows, tokens), generator=generator)
    ids[:, :9] = ids[0, :9]
    labels = torch.full((rows, tokens), -100)
    for row, end in enumerate((tokens, 40, 131)):
        labels[row, end - 2 : end] = ids[row, end - 2 : end]
        ids[row, end:] = 0
    return {"input_ids": ids, "labels": labels}


def adapted(kind="llama", targets=ALL, adapters=("default",), **options):
    """A random model with adapters whose B is not zero."""
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen 2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    }[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn_like(parameter)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=list(targets), **options)
    model = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    loss_at_labels(model.get_base_model())
    return model.eval()


def loss_and_gradients(model, given=None) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**(given or batch())).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(found: dict, exact: dict) -> float:
    """Largest relative error of a matrix's gradient."""
    assert found.keys() == exact.keys() and found
    return max(((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact)


def without_the_libraries(model) -> None:
    """Their layers give what ours are compared with: it has to be seen that it is not they that compute."""
    model.get_base_model().model.forward = lambda *args, **kwargs: pytest.fail("the libraries' layers ran")


def plainly(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda: (plain, "in torch"))


@pytest.mark.parametrize("made", ["compiled", "plain"])
@pytest.mark.parametrize("kind", ["llama", "qwen 2"])
def test_loss_and_gradients_are_the_libraries_own(monkeypatch, kind, made):
    if made == "plain":
        plainly(monkeypatch)
    model = adapted(kind)
    loss, exact = loss_and_gradients(model)
    assert fast.make_fast(model).startswith("fp32 products, own decoder")
    without_the_libraries(model)
    for _ in range(2):  # the second time in buffers of the first
        mine, found = loss_and_gradients(model)
        assert mine == pytest.approx(loss, rel=1e-5) and worst(found, exact) < 3e-5


def test_a_step_after_a_narrower_one_and_one_without_its_backward_pass():
    model = adapted()
    _, exact = loss_and_gradients(model)
    fast.make_fast(model)
    narrow = {name: tensor[:, :60] for name, tensor in batch().items()}
    loss_and_gradients(model, narrow)
    kept = model(**batch()).loss  # its buffers must not be given to the next one
    _, found = loss_and_gradients(model)
    assert worst(found, exact) < 3e-5
    model.zero_grad()
    kept.backward()
    assert worst({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, exact) < 3e-5
    with pytest.raises(RuntimeError):
        kept.backward()


def test_all_tokens_labelled_as_in_the_objective_lm():
    model = adapted()
    ids = batch()["input_ids"]
    loss, exact = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    fast.make_fast(model)
    mine, found = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    assert mine == pytest.approx(loss, rel=1e-5) and worst(found, exact) < 3e-5


@pytest.mark.parametrize("answers", [[[7], [9]], [[7, 8], [7, 9]]], ids=["one token", "longer"])
def test_scores_and_perplexity_are_the_libraries_own(answers):
    model, rows = adapted(), batch()["input_ids"].tolist()
    prompts = [rows[0][:140], rows[1][:40], rows[2][:90]]
    examples = [{"input_ids": row, "labels": [-100] * 100 + row[100:]} for row in rows]
    ask = lambda: (
        score_labels(model, prompts, answers, detect().autocast),
        perplexity(model, examples, detect().autocast)["loss"],
    )
    scores, loss = ask()
    fast.make_fast(model)
    without_the_libraries(model)
    found, mine = ask()
    assert found == pytest.approx(scores, rel=1e-4) and mine == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["up_proj", "o_proj"]])
def test_lora_on_some_layers_only(targets):
    model = adapted(targets=targets)
    _, exact = loss_and_gradients(model)
    fast.make_fast(model)
    assert worst(loss_and_gradients(model)[1], exact) < 3e-5


def logits(model) -> torch.Tensor:
    return last_logits(model, batch()["input_ids"][:, :30], detect().autocast)


def test_adapters_switched_off_and_one_of_two():
    model = adapted(adapters=("default", "other"))
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model)
    with model.disable_adapter():
        expected["base"] = logits(model)
    fast.make_fast(model)
    for name in ("other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected["base"], rtol=1e-4, atol=1e-5)


def test_an_adapter_of_zeros_changes_no_bit():
    """The guard starts_as_base asks for exactly that."""
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    fast.make_fast(model)
    with_adapter = logits(model)
    with model.disable_adapter():
        assert torch.equal(with_adapter, logits(model))


def test_an_adapters_strength_may_change():
    """Regression: the scaling was read once; llama.cpp/parity.py changes it."""
    model = adapted()
    fast.make_fast(model)
    logits(model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 0.5
    mine = logits(model)
    del model.get_base_model().cpu_decoder
    torch.testing.assert_close(mine, logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_comes_later_and_is_larger():
    model = adapted()
    fast.make_fast(model)
    larger = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=ALL, init_lora_weights=False)
    model.add_adapter("larger", larger)
    model.set_adapter("larger")
    mine = logits(model)
    del model.get_base_model().cpu_decoder
    torch.testing.assert_close(mine, logits(model), rtol=1e-4, atol=1e-5)


def test_merged_adapters_are_left_to_peft():
    model = adapted()
    expected = logits(model)
    fast.make_fast(model)
    model.merge_adapter()
    assert attach.usable(model.get_base_model()) is None
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert attach.usable(model.get_base_model()) is not None


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"lora_dropout": 0.5}, "LoRA's dropout"),
        ({"use_dora": True}, "DoRA or another variant"),
        ({"lora_bias": True}, "LoRA with a bias"),
        ({"modules_to_save": ["lm_head"]}, "is trained as well"),
    ],
)
def test_what_it_does_not_do_is_left_to_the_libraries(options, reason):
    model = adapted(**options)
    torch.manual_seed(1)
    loss, exact = loss_and_gradients(model.train())
    words = fast.make_fast(model)
    assert words.startswith("the libraries' own: ") and reason in words
    torch.manual_seed(1)
    assert loss_and_gradients(model)[0] == loss


def test_checkpointing_windows_and_little_memory_are_left_to_the_libraries(monkeypatch):
    model = adapted()
    lm = model.get_base_model()
    lm.config.hidden_act = "gelu"
    assert "activation (gelu)" in attach.why_not(model, lm, "fp32")
    lm.config.hidden_act = "silu"
    monkeypatch.setattr(attach.psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    assert "GB that are free" in fast.make_fast(model)
    monkeypatch.undo()
    lm.gradient_checkpointing_enable()
    assert "gradient checkpointing" in fast.make_fast(model)
    assert "--lane libraries" in fast.make_fast(adapted(), "libraries")


def test_a_four_bit_base_keeps_its_names_its_bytes_and_its_values(tiny_folder):
    from qlora.training.guards import frozen_hash

    base = load_base(str(tiny_folder), "nf4", detect(lane="fp32"))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ALL, init_lora_weights=False)
    model = get_peft_model(base.model, config)
    loss_at_labels(base.model)
    names, given = list(model.state_dict()), batch()
    loss, exact = loss_and_gradients(model, given)
    fast.make_fast(model)
    mine, found = loss_and_gradients(model, given)
    assert mine == pytest.approx(loss, rel=1e-4) and worst(found, exact) < 1e-3
    assert list(model.state_dict()) == names
    before = frozen_hash(model)
    loss_and_gradients(model, given)
    assert frozen_hash(model) == before
    base.model.cpu_decoder.layers[1].o.matrix[0, 0] += 1
    assert frozen_hash(model) != before, "what is multiplied with is watched as well"


@pytest.fixture(scope="module")
def compiled_half():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "processor_has", lambda flag: True)
        return kernels.load_half.__wrapped__()


@pytest.fixture
def half(monkeypatch, compiled_half):
    """Products in fp16 on any processor: slow where it does not calculate in fp16, and as good."""
    if compiled_half[0] is None:
        pytest.skip(compiled_half[1])
    monkeypatch.setattr(kernels, "load_half", lambda: compiled_half)
    return compiled_half[0]


@pytest.mark.parametrize("rows, inputs, out", [(5, 40, 96), (17, 300, 100), (130, 96, 7)])
def test_products_in_fp16_are_closer_than_bf16s(half, rows, inputs, out):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs + 3)[:, :inputs] * 1e5, torch.randn(out, inputs) * 1e-3
    packed = torch.zeros(kernels.packed_size(out, inputs), dtype=torch.float16)
    half.half_pack(weight, weight.abs().max().item(), packed)
    y = torch.full((rows, out + 5), 9.0)[:, :out]
    half.half_product(x, packed, weight.abs().max().item(), y)
    exact = x.double() @ weight.double().t()
    bf16 = (x.bfloat16().double() @ weight.bfloat16().double().t() - exact).norm() / exact.norm()
    assert ((y - exact).norm() / exact.norm()) < 0.7 * bf16 < 3e-3


def test_what_is_not_a_number_stays_so_in_fp16(half):
    x = torch.ones(9, 100)
    x[3, 5] = x[8, 99] = float("nan")
    packed, y = torch.zeros(kernels.packed_size(4, 100), dtype=torch.float16), torch.zeros(9, 4)
    half.half_pack(torch.ones(4, 100), 1.0, packed)
    half.half_product(x, packed, 1.0, y)
    assert y.isnan().all(1).tolist() == [i in (3, 8) for i in range(9)] and (y[0] == 100).all()


def test_the_lane_of_fp16_trains_as_fp32_does(half):
    model = adapted()
    loss, exact = loss_and_gradients(model)
    assert fast.make_fast(model, "fp16").startswith("fp16 products, own decoder")
    mine, found = loss_and_gradients(model)
    assert mine == pytest.approx(loss, rel=1e-3) and worst(found, exact) < 5e-2


def test_a_lane_that_is_not_to_be_had_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(kernels, "processor_has", lambda flag: False)
    monkeypatch.setattr(kernels, "load_half", kernels.load_half.__wrapped__)
    with pytest.raises(UserError, match="--lane fp16: this processor does not calculate in fp16"):
        detect(lane="fp16")


@pytest.mark.parametrize("lane", DTYPES)
def test_a_young_adapter_is_not_rounded_away(lane):
    """Regression: its contribution was added to bf16 outputs, where most of it was lost."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 48, bias=False), torch.randn(20, 64)
    lora = Lora(*(torch.nn.Parameter(torch.randn(s)) for s in ((4, 64), (48, 4))), 1.0)
    lora.b.data *= 1e-4  # so that the sum moves a bf16 output by less than its last bit
    group = Group([layer], DTYPES[lane], 4)
    without = group.up(x, Pool(), "y", "low")[0].clone()
    for copy, parameter in zip(group.take([lora]), (lora.a, lora.b)):
        copy.copy_(parameter.detach())
    added = group.up(x, Pool(), "y", "low")[0] - without
    exact = x @ lora.a.t() @ lora.b.t()
    assert ((added - exact).norm() / exact.norm()).item() < {"fp32": 1e-2, "bf16": 2e-2}[lane]
    rounded = (without.bfloat16() + exact.bfloat16()).float() - without.bfloat16().float()
    assert (rounded - exact).norm() > 0.5 * exact.norm(), "a sum in bf16 would lose it"
