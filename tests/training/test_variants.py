"""The variants of LoRA: how each begins, what is saved, and that plain PEFT makes the trained model of it."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import SMALL_RUN, here
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_guards import fires, lora_model, step
from transformers import AutoModelForCausalLM

from config import LORA_VARIANTS, TrainSettings
from qlora import variants
from qlora.adapters import read_adapter
from qlora.cli import UsageError, UserError
from qlora.hardware import detect
from qlora.loading import load_base, never_repack, quantization_config
from qlora.logits import last_logits
from qlora.training import guards as g

PRECISION = {"pissa": "fp32", "olora": "fp32"}  # without rounding; nf4 for the others
WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def flags(variant, model, out):
    named = ("--lora-variant", variant, "--precision", PRECISION.get(variant, "nf4"))
    return ("--model", model, "--output-dir", out, *SMALL_RUN, *named, "--learning-rate", "0.005")


@pytest.fixture(scope="module", params=LORA_VARIANTS)
def run(request, tmp_path_factory, tiny_folder):
    """(variant, folder of a complete run of four steps, logits of the model in memory at its end)"""
    out, seen = tmp_path_factory.mktemp(request.param) / "run", []
    real = g.check_end

    def watched(guards, model, *rest):
        seen.append(last_logits(model, IDS, nullcontext))
        real(guards, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "check_end", watched)
        done = here("qlora_finetune.py", *flags(request.param, tiny_folder, out))
    assert done.returncode == 0, done.stderr
    return request.param, out, seen[0]


def test_a_run_holds_all_guards(run):
    variant, out, _ = run
    results = json.loads((out / "report.json").read_text())["guards"]
    names = {guard["name"] for guard in results}
    begins = "starts_nearer" if variant == "loftq" else "starts_as_base"
    assert len(results) == 10 and all(guard["passed"] for guard in results)
    assert {begins, "reloads_same", "base_unchanged", "all_matrices_learn"} <= names


def test_the_saved_folder_gives_the_trained_logits_in_plain_peft(run, tiny_folder):
    variant, out, trained = run
    precision = PRECISION.get(variant, "nf4")
    quantization = quantization_config(precision, torch.float32)
    options = {"quantization_config": quantization} if quantization else {}
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, **options)
    never_repack(base)  # some CPUs would multiply the 4-bit weights in bf16
    before = last_logits(base, IDS, nullcontext)
    there = last_logits(PeftModel.from_pretrained(base, out), IDS, nullcontext)
    size = trained.abs().max()
    assert (there - trained).abs().max() < 1e-4 * size < (there - before).abs().max()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == (32 if variant in PRECISION else 16)
    assert len(config["target_modules"]) == 7 and not config["rank_pattern"] and not config["eva_config"]


# Those that begin by something of this repository; resuming and merging plain LoRA has tests of its own.
begin_elsewhere = pytest.mark.parametrize("run", ["pissa", "loftq", "eva"], indirect=True)


@begin_elsewhere
def test_a_resumed_run_ends_with_the_same_bytes(run, tmp_path):
    variant, out, _ = run
    again = shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(again / "checkpoint-4")
    for lost in ("report.json", WEIGHTS):
        (again / lost).unlink()
    done = here("qlora_finetune.py", "--output-dir", again, "--resume")
    assert done.returncode == 0 and "resuming from" in done.stderr, done.stderr
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    evaluation = [json.loads((f / "report.json").read_text())["evaluation"] for f in (again, out)]
    assert evaluation[0] == evaluation[1]


@begin_elsewhere
def test_it_answers_and_is_merged(run, tmp_path):
    variant, out, trained = run
    said = here("qlora_inference.py", "--adapter", out, "--max-new-tokens", "2", "A fine film.")
    assert said.returncode == 0, said.stderr
    done = here(
        *("qlora_inference.py", "--adapter", out, "--lane", "fp32"),
        *("--merge", tmp_path / "merged", "--merge-dtype", "fp32"),
    )
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    there = last_logits(merged, IDS, nullcontext)
    assert (there - trained).abs().max() < 1e-3 * trained.abs().max()


def begun(folder, variant, precision=None, **settings):
    """(model, its base, start) of a fresh adapter"""
    precision = precision or PRECISION.get(variant, "nf4")
    base = load_base(str(folder), precision, detect(precision, lane="fp32"))
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = TrainSettings(lora_variant=variant, lora_r=4, batch_size=2, **settings)
    torch.manual_seed(0)
    options = LORA_VARIANTS[variant].options
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **options)
    model = get_peft_model(base.model, config)
    rows = [{"input_ids": list(range(i, i + 9)), "labels": list(range(i, i + 9))} for i in range(5, 25)]
    return model, base, variants.begin(model, base, rows, settings)


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_conversion_is_pefts_own(tiny_folder, tmp_path, variant):
    model, _, start = begun(tiny_folder, variant)
    model.save_pretrained(tmp_path / "initial")
    step(model, rate=0.1)
    variants.save(model, tmp_path / "ours", start)
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=initial)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs")]
    assert all(configs[0][k] == configs[1][k] for k in ("r", "lora_alpha", "init_lora_weights", "use_rslora"))


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_a_part_that_was_not_taken_off_the_base_is_seen(tiny_folder, variant):
    model, _, start = begun(tiny_folder, variant)
    check = lambda: g.starts_as_untouched(g.Guards(), model, IDS, nullcontext, start.untouched())
    check()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.get_base_layer().weight.data += layer.get_delta_weight("default")  # the base has it as well
    with fires("starts_as_base"):
        check()


def test_a_conversion_that_forgets_the_beginning_is_seen(tiny_folder, tmp_path):
    # saved as it stands, PiSSA's adapter adds W's largest directions a second time
    model, _, start = begun(tiny_folder, "pissa")
    step(model, rate=0.1)
    check = lambda folder: g.reloads_on_untouched(
        g.Guards(), model, IDS, nullcontext, start.untouched(folder)
    )
    variants.save(model, tmp_path / "right", start)
    check(tmp_path / "right")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "wrong")
    with fires("reloads_same"):
        check(tmp_path / "wrong")


def test_loftq_begins_nearer_to_the_original_weights_whatever_the_scale(tiny_folder):
    # PEFT's replace_lora_weights_loftq forgets the scale alpha/r: at 2 nothing would be gained
    model, base, start = begun(tiny_folder, "loftq")
    g.starts_nearer(g.Guards(), start.distances)
    assert len(start.distances) == 6
    for without, with_it in start.distances.values():
        assert 0.05 < without < 0.15 and with_it < 0.95 * without
    worse = {**start.distances, "layers.0": (0.09, 0.1)}
    with fires("starts_nearer"):
        g.starts_nearer(g.Guards(), worse)
    # what the distances say, by the layer's own output: s B A x is what quantization lost
    name, (_, with_it) = next(iter(start.distances.items()))
    layer = dict(variants.lora_layers(model))[name]
    original = load_base(str(tiny_folder), "fp32", base.hardware).model.get_submodule(name)
    x = torch.eye(layer.in_features)
    gap = (layer(x) - original(x)).norm() / original(x).norm()
    assert gap.item() == pytest.approx(with_it, rel=1e-3)


def test_eva_takes_the_directions_of_the_inputs(tiny_folder):
    model, _, _ = begun(tiny_folder, "eva")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, seen = layer.lora_A["default"].weight.detach(), []
    assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-3)  # orthonormal rows
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=torch.tensor([list(range(i, i + 9)) for i in range(5, 25)]))
    hook.remove()
    x = seen[0] - seen[0].mean(0)
    kept, largest = (x @ a.T).norm() ** 2, (torch.linalg.svdvals(x)[:4] ** 2).sum()
    assert kept > 0.8 * largest
    assert torch.count_nonzero(layer.lora_B["default"].weight) == 0


def test_padding_is_no_input_of_eva():
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 5)]
    (batch,) = variants.eva_batches(rows, 2, 4)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    with pytest.raises(UsageError, match="--lora-r 5: eva needs twice as many training tokens"):
        variants.eva_batches(rows, 2, 5)


def test_a_planted_b_is_seen_for_plain_lora(tiny_folder):
    model = lora_model(tiny_folder)
    check = lambda: g.check_start(
        g.Guards(), model, [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}], nullcontext, variants.Start()
    )
    check()
    model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight.data.fill_(0.1)
    with fires("starts_as_base"):
        check()


@pytest.mark.parametrize(
    "variant, more, words",
    [
        (
            "pissa",
            (),
            "starts from 16-bit weights, and what it saves would not fit the nf4 base; add --precision bf16",
        ),
        ("olora", ("--precision", "int8"), "would not fit the int8 base"),
        ("loftq", ("--precision", "bf16"), "bf16 weights are not quantized; add --precision nf4"),
        (
            "pissa",
            ("--precision", "bf16", "--lora-r", "64"),
            "--lora-r 64: pissa takes at most 32, the rank of",
        ),
        ("eva", ("--lora-r", "64"), "--lora-r 64: eva takes at most 32"),
    ],
)
def test_what_does_not_go_together_is_one_line(tiny_folder, tmp_path, variant, more, words):
    given = ("--model", tiny_folder, "--output-dir", tmp_path / "run", *SMALL_RUN, "--lora-variant", variant)
    done = here("qlora_finetune.py", *given, *more)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run" / "settings.json").exists()


def test_the_lab_shows_only_variants_that_begin_as_lora():
    done = here("quant_llama32_4bit_lora.py", "--lora-variant", "pissa", "--untrained")
    assert (
        done.returncode == 2 and "--untrained shows how lora, rslora and dora begin, not pissa" in done.stderr
    )


@pytest.mark.parametrize("run", ["pissa", "eva"], indirect=True)
def test_an_adapter_that_is_not_converted_is_refused(run, tmp_path):
    variant, out, _ = run
    checkpoint = out / "checkpoint-4"
    if variant in PRECISION:
        with pytest.raises(UserError, match="took a part off the base's weights; save it as plain LoRA"):
            read_adapter(checkpoint)
    else:
        read_adapter(checkpoint)
