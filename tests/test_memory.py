"""Memory is predicted by running real code on tensors without data; here the predictions meet real tensors."""

from __future__ import annotations

import json

import pytest
import torch

from qlora.hardware import Hardware, detect
from qlora.ledger import model_config
from qlora.live_bytes import LiveBytes
from qlora.memory import Job, predict, predict_inference, predict_merge, predict_training, weights_bytes
from qlora.plan import cards, footprints, make_plan, remedies


def test_a_storage_counts_once_from_its_birth_to_its_death():
    live = LiveBytes()
    with live:
        live.tag = "kept"
        a = torch.zeros(1000)  # 4000 bytes
        view = a[:10].view(2, 5)  # no storage of its own
        live.tag = "passing"
        b = torch.ones(500)  # 2000 bytes
        del b
        live.tag = "late"
        c = a + 1  # 4000 bytes
    assert (live.now, live.peak) == (8000, 8000)
    assert {k: v for k, v in live.live.items() if v} == {"kept": 4000, "late": 4000}
    del a
    assert live.now == 8000, "the view still holds it"
    del view, c
    assert live.now == 0


def test_what_autograd_keeps_is_alive_and_cuda_blocks_are_rounded():
    live = LiveBytes(block=512)
    x = torch.randn(100, requires_grad=True)
    with live:
        y = x.exp()  # 400 bytes -> 512; the graph keeps it for the backward pass
        z = y.sum()  # 4 bytes -> 512
        del y
    assert live.now == 1024
    del z
    assert live.now == 0


def bytes_of(model) -> int:
    """Parameters, buffers and quantization constants of a loaded model, each storage once."""
    live = LiveBytes()
    tensors = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        if state := getattr(p, "quant_state", None):
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    for module in model.modules():
        for scales in (getattr(getattr(module, "weight", None), "SCB", None), getattr(getattr(module, "state", None), "SCB", None)):
            tensors += [scales] if scales is not None else []
    for t in tensors:
        live._add(t.untyped_storage())
    return live.now


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "bf16", "fp16", "fp32"])
def test_weights_are_predicted_to_half_a_percent_at_every_precision(tiny_folder, precision):
    from qlora.loading import load_base

    hardware = detect(precision)
    loaded = bytes_of(load_base(str(tiny_folder), precision, hardware).model)
    predicted = weights_bytes(model_config(str(tiny_folder))[0], Job(precision=precision, dtype=hardware.dtype))
    assert predicted == pytest.approx(loaded, rel=0.005)


def real_step(folder, job: Job) -> dict:
    """The same job on real tensors: peak of live bytes in the third step, and what adapters and optimizer hold."""
    from peft import LoraConfig, get_peft_model

    from qlora.fast import speed_up_base, speed_up_lora
    from qlora.loading import load_base
    from qlora.logits import loss_at_labels
    from qlora.lora import resolve_targets

    lm = load_base(str(folder), job.precision, detect(job.precision)).model
    before = torch.empty(0)
    speed_up_base(lm)
    loss_at_labels(lm)
    model = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", r=job.lora_r, lora_alpha=2 * job.lora_r, target_modules=resolve_targets(lm, job.target_modules)))
    if job.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    speed_up_lora(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, lm.config.vocab_size, (job.batch_size, job.length))
    labels = ids.clone()
    if not job.every_token:
        labels[:, :-2] = -100
    for _ in range(3):
        live = LiveBytes()
        for owner in ([*model.parameters(), *model.buffers(), ids, labels, before],
                      [t for state in optimizer.state.values() for t in state.values()],
                      [m.dequantized for m in model.modules() if hasattr(m, "dequantized")]):
            for tensor in owner:
                live._add(tensor.untyped_storage())
        live.now += bytes_of(lm) - sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*lm.parameters(), *lm.buffers()]}.values())
        with live:
            model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        optimizer.zero_grad()
    return {"peak": live.peak, "adapters": sum(p.numel() * 4 for p in trained),
            "optimizer": sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())}


@pytest.mark.parametrize("job", [
    Job(length=64), Job(length=64, batch_size=8, gradient_checkpointing=True), Job(length=128, every_token=True),
    Job(length=64, lora_r=64, target_modules="attention"), Job(length=64, precision="bf16"),
], ids=["default", "checkpointing", "every token", "attention r64", "bf16"])
def test_a_real_training_step_holds_what_was_predicted(tiny_folder, job):
    if detect().dtype != torch.bfloat16:
        pytest.skip("the fast path is bf16's")
    predicted, real = predict_training(model_config(str(tiny_folder))[0], job), real_step(tiny_folder, job)
    assert predicted["peak"] == pytest.approx(real["peak"], rel=0.03)
    assert predicted["adapters"] == real["adapters"]
    assert predicted["optimizer"] == pytest.approx(real["optimizer"], rel=0.005)


@pytest.mark.parametrize("job", [Job(length=64), Job(device="cuda", length=64, gradient_checkpointing=True), Job(precision="int8", length=64)],
                         ids=["cpu", "gpu, checkpointing", "int8"])
def test_alike_layers_are_extrapolated_to_the_byte(job):
    config = model_config("smollm2-135m")[0]
    config.num_hidden_layers = 6
    assert predict(predict_training, config, job) == predict_training(config, job)


def test_layers_that_differ_are_not_extrapolated():
    from qlora.memory import _alike

    config = model_config("qwen2.5-0.5b")[0]
    assert _alike(config.to_json_string(use_diff=False), type(config))
    config.layer_types = ["sliding_attention", "full_attention"] * 12
    assert not _alike(config.to_json_string(use_diff=False), type(config))


def test_planning_leaves_no_tensor_without_data_behind(tiny_folder):
    predict_training(model_config(str(tiny_folder))[0], Job(length=64))
    import bitsandbytes.functional as functional

    weight = torch.randn(64, 64)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    back = functional.dequantize_4bit(packed, state)
    assert type(back) is torch.Tensor and 0.05 < ((back - weight).norm() / weight.norm()).item() < 0.15


def test_the_kv_cache_is_worked_out_by_hand():
    # Llama 3.2 3B: 2 (k and v) x 28 layers x 8 heads x 128 x 512 tokens x 2 bytes = 58,720,256
    assert predict(predict_inference, model_config("llama-3.2-3b")[0], Job(batch_size=1, length=512))["kv_cache"] == 58_720_256


def test_the_course_figures_come_out_of_the_config():
    table = footprints(model_config("llama-3.2-3b")[0])
    # Embedding (tied head): 128256 x 3072. Linear: 28 x (2 x 3072 x 3072 + 2 x 1024 x 3072 + 3 x 8192 x 3072) = 2,818,572,288
    embedding, linear, norms = 128256 * 3072, 2_818_572_288, 57 * 3072
    assert table["fp32"]["footprint"] / 1e9 == pytest.approx(12.85, abs=0.005)  # 12.9
    assert table["int8"]["footprint"] / 1e9 == pytest.approx(3.61, abs=0.005)  # 3.6
    rotary = table["nf4"]["norms and the rest"] - 2 * norms  # its frequencies
    assert 0 < rotary < 2000
    assert table["nf4"]["footprint"] == 2 * embedding + linear // 2 + 2 * norms + rotary  # 2.198 GB: 2.2
    assert (table["nf4"]["footprint"] + 4 * 18_350_080) / 1e9 == pytest.approx(2.271, abs=0.001)  # with attention adapters of rank 32
    # Block constants: 8 bits per 64 weights and 32 per 64 x 256 of them = 0.127 bits a weight, and small tables
    assert 8 * table["nf4"]["block constants"] / linear == pytest.approx(8 / 64 + 32 / (64 * 256), rel=0.01)


def test_merging_needs_both_models_in_memory_and_one_on_disk():
    config = model_config("llama-3.2-1b")[0]
    merge = predict(predict_merge, config, Job())
    sixteen, four = (predict(lambda c, j: {"all": weights_bytes(c, j)}, config, Job(precision=p))["all"] for p in ("bf16", "nf4"))
    # adapters: 16 layers x r 16 x (2 (2048 + 2048) + 2 (2048 + 512) + 3 (2048 + 8192)) x 4 bytes
    assert merge == {"ram": sixteen + four + 45_088_768, "disk": sixteen}


def test_eight_billion_parameters_fit_a_t4_in_4_bits_and_not_in_16():
    config = model_config("llama-3.1-8b")[0]
    rows = {row["card"]: row for row in cards(config, Job(batch_size=1, length=512, gradient_checkpointing=True))}
    assert rows["T4 16"]["fits"] and rows["T4 16"]["largest_batch"] < rows["A100 80"]["largest_batch"]
    assert not {row["card"]: row for row in cards(config, Job(precision="bf16"))}["T4 16"]["fits"]


def test_the_largest_batch_fits_and_one_more_does_not():
    config = model_config("llama-3.2-1b")[0]
    card = next(row for row in cards(config, Job(length=512)) if row["card"] == "RTX 4060 8")
    peaks = [predict(predict_training, config, Job(device="cuda", length=512, batch_size=card["largest_batch"] + more))["peak"] for more in (0, 1)]
    assert peaks[0] <= card["capacity"] < peaks[1]


def test_where_a_job_does_not_fit_remedies_are_priced():
    config = model_config("llama-3.2-1b")[0]
    machine = Hardware("cpu", "a small machine", torch.bfloat16, "test", memory_gib=2.0)
    plan = make_plan(config, Job(batch_size=8, length=512), machine)
    assert not plan["machine"]["fits"] and plan["machine"]["remedies"]
    assert all(remedy["peak"] < plan["training"]["peak"] and remedy["price"] for remedy in plan["machine"]["remedies"])


def test_remedies_stop_at_the_second_that_is_enough():
    found = remedies(model_config("llama-3.2-1b")[0], Job(), 1e12)
    assert len(found) == 2 and all(remedy["fits"] for remedy in found)


def test_a_run_reports_what_was_predicted_and_what_was_measured(trained):
    memory = json.loads((trained / "report.json").read_text())["memory"]
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.1)
    assert memory["process_peak_bytes"] > memory["measured_peak_bytes"]
