"""Memory is predicted by running real code on tensors without data; here predictions meet real tensors."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from config import PRECISIONS, TrainSettings
from qlora import qat
from qlora.batches import most_labels
from qlora.calibrated import calibrated_folder
from qlora.cli import UsageError, UserError
from qlora.fast import make_fast
from qlora.hardware import Hardware, detect
from qlora.live_bytes import LiveBytes
from qlora.loading import load_base
from qlora.logits import IGNORE
from qlora.lora import lora_config
from qlora.memory.plan import (
    CARDS,
    cards,
    footprints,
    judge,
    make_plan,
    on_card,
    on_several,
    predict_run,
    remedies,
    show_footprints,
    show_plan,
    training_peak,
)
from qlora.memory.step import (
    CUDA_BLOCK,
    Job,
    first_layers,
    predict,
    predict_inference,
    predict_merge,
    predict_training,
    weights_bytes,
)
from qlora.shapes import model_config
from qlora.weights import held_bytes

SMALL_MACHINE = Hardware("cpu", "a small machine", torch.bfloat16, "test", memory_gib=2.0)


@pytest.mark.parametrize("precision", [name for name, options in PRECISIONS.items() if options])
def test_weights_are_predicted_to_half_a_percent_at_every_precision(tiny_folder, precision):
    hardware = detect(precision)
    loaded = held_bytes(load_base(str(tiny_folder), precision, hardware).model.modules())
    job = Job(precision=precision, dtype=hardware.dtype)
    assert weights_bytes(model_config(str(tiny_folder))[0], job) == pytest.approx(loaded, rel=0.005)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_of_packed_models_are_predicted(tiny_folder, tmp_path, method):
    machine, ids = detect("fp32"), torch.arange(100, 356).view(8, 32)
    folder = calibrated_folder(load_base(str(tiny_folder), "fp32", machine), ids, method, 32, tmp_path)
    loaded = held_bytes(load_base(str(folder), method, machine).model.modules())
    job = Job(precision=method, dtype=machine.dtype)
    assert weights_bytes(model_config(str(folder))[0], job) == pytest.approx(loaded, rel=0.005)
    with pytest.raises(UserError, match="no plan of it"):
        weights_bytes(model_config(str(tiny_folder))[0], job)


def real_step(folder, job: Job) -> dict:
    """The same job on real tensors: peak of live bytes in the third step, bytes of adapters and optimizer."""
    gc.collect()
    others = LiveBytes()
    others.count_existing()
    lm = load_base(str(folder), job.precision, detect(job.precision, lane=job.lane)).model
    model = get_peft_model(lm, qat.register(lora_config(lm, job), job.qat))
    qat.use_grid(model, "default", job.qat)
    if job.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    make_fast(model, job.lane)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, lm.config.vocab_size, (job.batch_size, job.length))
    labels = ids.clone()
    if job.labels is not None:
        labels[:, :-2] = IGNORE
    packed = {"position_ids": torch.arange(job.length).expand(ids.shape) % 50} if job.packing else {}
    for _ in range(3):
        live = LiveBytes()
        live.count_existing()
        with live:
            model(input_ids=ids, labels=labels, **packed).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        optimizer.zero_grad()
    state = [t for kept in optimizer.state.values() for t in kept.values()]
    return {
        "peak": live.peak - others.now,
        "adapters": sum(p.numel() * 4 for p in trained),
        "optimizer": sum(t.nbytes for t in state),
    }


@pytest.mark.parametrize(
    "job",
    [
        Job(length=64),
        Job(length=64, batch_size=8, gradient_checkpointing=True),
        Job(length=128, labels=None),
        Job(length=64, lora_r=64, target_modules="attention"),
        Job(length=64, precision="bf16"),
        Job(length=64, lane="bf16"),
        Job(length=64, lane="libraries"),
        Job(length=128, lane="libraries", labels=None, packing=True),
        Job(length=64, qat="Q4_0"),
        Job(length=64, qat="fp8", precision="bf16"),
    ],
    ids=[
        *("default", "checkpointing", "every token", "attention r64", "bf16", "lane bf16", "libraries"),
        *("packing", "qat", "qat on bf16"),
    ],
)
def test_a_real_training_step_holds_what_was_predicted(tiny_folder, job):
    job = replace(job, dtype=detect(job.precision, lane=job.lane).dtype)
    predicted, real = predict_training(model_config(str(tiny_folder))[0], job), real_step(tiny_folder, job)
    assert predicted["peak"] == pytest.approx(real["peak"], rel=0.03)
    assert predicted["adapters"] == real["adapters"]
    assert predicted["optimizer"] == pytest.approx(real["optimizer"], rel=0.005)


@pytest.mark.parametrize(
    "job",
    [
        Job(length=64),
        Job(device="cuda", length=64, gradient_checkpointing=True),
        Job(precision="int8", length=64),
    ],
    ids=["cpu", "gpu, checkpointing", "int8"],
)
def test_alike_layers_are_extrapolated_to_the_byte(job):
    config = model_config("smollm2-135m")[0]
    config.num_hidden_layers = 6
    assert predict(predict_training, config, job) == predict_training(config, job)


def test_layers_that_differ_are_not_extrapolated():
    from qlora.memory.step import _alike

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
    config = model_config("llama-3.2-3b")[0]
    assert predict(predict_inference, config, Job(batch_size=1, length=512))["kv_cache"] == 58_720_256


def test_the_course_figures_come_out_of_the_config():
    table = footprints(model_config("llama-3.2-3b")[0])
    # Embedding (tied head): 128256 x 3072.
    # Linear: 28 x (2 x 3072 x 3072 + 2 x 1024 x 3072 + 3 x 8192 x 3072) = 2,818,572,288
    embedding, linear, norms = 128256 * 3072, 2_818_572_288, 57 * 3072
    assert table["fp32"]["footprint"] / 1e9 == pytest.approx(12.85, abs=0.005)  # 12.9
    assert table["int8"]["footprint"] / 1e9 == pytest.approx(3.61, abs=0.005)  # 3.6
    rotary = table["nf4"]["norms and the rest"] - 2 * norms  # its frequencies
    assert 0 < rotary < 2000
    assert table["nf4"]["footprint"] == 2 * embedding + linear // 2 + 2 * norms + rotary  # 2.198 GB: 2.2
    attention_r32 = 4 * 18_350_080  # bytes of adapters of rank 32 on the attention
    assert (table["nf4"]["footprint"] + attention_r32) / 1e9 == pytest.approx(2.271, abs=0.001)
    # Block constants: 8 bits per 64 weights, 32 per 64 x 256 of them: 0.127 bits a weight; and small tables
    assert 8 * table["nf4"]["block constants"] / linear == pytest.approx(8 / 64 + 32 / (64 * 256), rel=0.01)


def test_merging_needs_both_models_in_memory_and_one_on_disk():
    config = model_config("llama-3.2-1b")[0]
    merge = predict(predict_merge, config, Job())
    sixteen, four = (
        predict(lambda c, j: {"all": weights_bytes(c, j)}, config, Job(precision=p))["all"]
        for p in ("bf16", "nf4")
    )
    # adapters: 16 layers x r 16 x (2 (2048 + 2048) + 2 (2048 + 512) + 3 (2048 + 8192)) x 4 bytes
    assert merge == {"ram": sixteen + four + 45_088_768, "disk": sixteen}


def test_eight_billion_parameters_fit_a_t4_in_4_bits_and_not_in_16():
    config = model_config("llama-3.1-8b")[0]
    job = Job(batch_size=1, length=512, gradient_checkpointing=True)
    rows = {row["card"]: row for row in cards(config, job)}
    assert rows["T4 16"]["fits"] and rows["T4 16"]["largest_batch"] < rows["A100 80"]["largest_batch"]
    assert not {row["card"]: row for row in cards(config, Job(precision="bf16"))}["T4 16"]["fits"]


def test_a_t4_is_planned_with_the_kernel_that_it_has():
    """Compute capability 7.5 has no FlashAttention: keys and values are kept once for each head."""
    config = model_config("llama-3.2-1b")[0]
    kept = {}
    for capability in ((7, 5), (8, 0)):
        job = Job(device="cuda", dtype=torch.float16, length=512, capability=capability)
        kept[capability] = predict_training(first_layers(config, 2), job)["activations"]
    # 2 layers x 4 rows x 512 tokens x (k and v) x (32 - 8 heads) x 64 x 2 bytes; a seed and an offset a layer
    assert kept[7, 5] - kept[8, 0] == 2 * 4 * 512 * 2 * 24 * 64 * 2 + 2 * 2 * CUDA_BLOCK
    rows = {row["card"]: row["attention"] for row in cards(config, Job())}
    assert rows["T4 16"] == "efficient" and rows["RTX 3060 12"] == "flash"
    assert {row["attention"] for row in cards(config, Job(precision="fp32", dtype=torch.float32))} == {
        "efficient"
    }


def test_cards_with_one_prediction_are_what_each_would_be_predicted_alone(tiny_folder):
    config, job = model_config(str(tiny_folder))[0], Job()
    for row in cards(config, job, gpus=2):
        gpu = on_card(job, CARDS[row["card"]][1])
        peaks = [training_peak(config, gpu, batch_size=n * job.batch_size) for n in (1, 2)]
        verdict, _ = judge(job, row["capacity"], *peaks)
        wanted = {"peak": peaks[0], **verdict, **on_several(config, gpu, 2)}
        assert {key: row[key] for key in wanted} == wanted, row["card"]


def test_a_card_is_judged_alike_on_every_machine(tiny_folder):
    # Planned on an H100, its larger cuBLAS workspace was counted for every card.
    config = model_config(str(tiny_folder))[0]
    assert cards(config, Job(device="cuda", capability=(9, 0))) == cards(config, Job())


def test_the_largest_batch_fits_and_one_more_does_not():
    config = model_config("llama-3.2-1b")[0]
    job = Job(device="cuda", length=512)
    card = next(row for row in cards(config, job) if row["card"] == "RTX 4060 8")
    peaks = [training_peak(config, job, batch_size=card["largest_batch"] + more) for more in (0, 1)]
    assert peaks[0] <= card["capacity"] < peaks[1]


@pytest.fixture(scope="module")
def tight_plan():
    """A job that does not fit: (its plan, config)."""
    config = model_config("llama-3.2-1b")[0]
    return make_plan(config, Job(batch_size=8, length=512), SMALL_MACHINE), config


def test_where_a_job_does_not_fit_remedies_are_priced(tight_plan):
    plan, _ = tight_plan
    assert not plan["machine"]["fits"] and plan["machine"]["remedies"]
    for remedy in plan["machine"]["remedies"]:
        assert remedy["peak"] < plan["training"]["peak"] and remedy["price"]


def test_remedies_stop_at_the_second_that_is_enough():
    found = remedies(model_config("llama-3.2-1b")[0], Job(), 1e12)
    assert len(found) == 2 and all(remedy["fits"] for remedy in found)


def test_a_plan_is_shown_with_its_remedies_and_its_cards(tight_plan, capsys):
    show_footprints("llama-3.2-1b", footprints(tight_plan[1]))
    show_plan(*tight_plan)
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # Two bytes for each of 1,235,814,400 parameters: 2.472 GB (and the rotary frequencies).
    assert next(row for row in rows if row.startswith("total")).split()[2] == "2.472"
    assert "this machine, a small machine, 0.54 GB for tensors: training does not fit" in "\n".join(rows)
    assert any(row.startswith("--batch-size 1 --grad-accum 8 the same updates") for row in rows)
    assert any(row.startswith("T4 16 fp16 efficient 15.25") for row in rows)
    # 16 layers x 2 (k and v) x 8 heads x 64 x 2 bytes = 32,768 bytes a token; the model reads 131,072.
    assert any("KV cache 0.017; 4.29 at the model's 131,072 tokens" in row for row in rows)


def test_a_run_says_what_it_will_take(tiny_folder, capsys):
    settings = TrainSettings(model=str(tiny_folder), precision="nf4", max_length=64)
    predicted = predict_run(settings, SMALL_MACHINE)
    assert predicted == predict_training(model_config(str(tiny_folder))[0], Job(length=64))
    told = capsys.readouterr().err
    assert "memory     0.0" in told and "weights" in told and "--plan" not in told


def test_chat_data_is_planned_by_its_labels(tiny_folder):
    # It was once planned as if every token were trained on.
    rows = [{"input_ids": [0] * 9, "labels": [-100] * 6 + [7, 8, 2]}, {"input_ids": [0], "labels": [-100]}]
    assert most_labels(rows) == 3
    settings = TrainSettings(model=str(tiny_folder), precision="nf4", max_length=256)
    whole = replace(settings, objective="lm")
    few, all_of_them = (predict_run(s, SMALL_MACHINE, labels=3)["peak"] for s in (settings, whole))
    assert few < all_of_them / 2


def test_a_run_that_will_not_fit_is_sent_to_the_plan(capsys):
    predict_run(TrainSettings(model="llama-3.2-3b", precision="nf4"), SMALL_MACHINE)
    told = capsys.readouterr().err
    assert "more than this machine's 0.54 GB" in told and "--plan --model llama-3.2-3b" in told


def test_what_cannot_be_planned_is_trained_without_a_prediction(tiny_folder, capsys):
    settings = TrainSettings(model=str(tiny_folder), precision="nf4", lora_variant="dora")
    assert predict_run(settings, SMALL_MACHINE) is None
    assert "not predicted: DoRA on quantized weights" in capsys.readouterr().err


def test_a_wrong_flag_is_refused_before_training(tiny_folder):
    settings = TrainSettings(model=str(tiny_folder), precision="nf4", target_modules="query")
    with pytest.raises(UsageError, match="the model has no query"):
        predict_run(settings, SMALL_MACHINE)


def test_a_run_reports_what_was_predicted_and_what_was_measured(trained):
    memory = json.loads((trained / "report.json").read_text())["memory"]
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.1)
    assert memory["process_peak_bytes"] > memory["measured_peak_bytes"]
