"""GPTQ and AWQ folders: codes against brute force, loading, LoRA's gradients, what is refused."""

import json
import shutil

import pytest
import torch
from conftest import SMALL_RUN, here
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora import calibrated
from qlora.cli import UserError
from qlora.fast import make_fast
from qlora.hardware import detect
from qlora.loading import load_base
from qlora.lora import linear_names
from qlora.packed import AWQ_ORDER, PackedLinear, Packing, Stored, pack, packed_tensors, unpack
from qlora.weights import dequantized, linear_layers, trainable_and_all

FP32 = detect("fp32", lane="fp32")
GROUP = 32


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """{method: the tiny model, quantized}"""
    rows = torch.randint(100, 40_000, (8, 32), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "MODELS_DIR", tmp_path_factory.mktemp("packed"))
        bases = {method: load_base(str(tiny_folder), "fp32", FP32) for method in ("gptq", "awq")}
        return {m: calibrated.calibrated_folder(base, rows, m, GROUP) for m, base in bases.items()}


@pytest.fixture(params=["gptq", "awq"])
def method(request):
    return request.param


@pytest.mark.parametrize("bits, order", [(4, None), (4, AWQ_ORDER), (8, None)])
def test_packing_keeps_every_code(bits, order):
    codes = torch.arange(2**bits).repeat(2).view(-1, 1).repeat(1, 3)
    packed = pack(codes, bits, order)
    assert packed.dtype == torch.int32 and packed.numel() * 32 // bits == codes.numel()
    assert torch.equal(unpack(packed, bits, order), codes.t().byte())


def random_layer(packing: Packing, inputs=64, outputs=16, groups=None):
    """(a layer read from a file's tensors, its weight as written down: scale * (code - zero))"""
    draw, count = torch.Generator().manual_seed(1), inputs // packing.group
    codes = torch.randint(0, 2**packing.bits, (outputs, inputs), generator=draw)
    zeros = torch.randint(0, 2**packing.bits, (outputs, count), generator=draw)
    scales = torch.rand(outputs, count, generator=draw).half() + 0.1
    stored = Stored(torch.nn.Linear(inputs, outputs, bias=False), packing)
    held = packed_tensors(codes, scales, zeros, packing)
    if groups is not None:
        held["g_idx"] = groups
    stored.load_state_dict(held)
    each = torch.arange(inputs) // packing.group if groups is None else groups
    return stored.unpacked(), scales.float()[:, each] * (codes - zeros[:, each])


@pytest.mark.parametrize(
    "packing",
    [Packing("gptq", 4, 32, 1), Packing("gptq", 4, 16, 0), Packing("gptq", 8, 32, 1), Packing("awq", 4, 32)],
)
def test_weight_is_scale_times_code_minus_zero(packing):
    layer, wanted = random_layer(packing)
    assert torch.equal(layer.weight, wanted) and torch.equal(dequantized(layer), wanted)
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), x @ wanted.T, atol=1e-4)


def test_groups_of_act_order_are_followed():
    layer, wanted = random_layer(Packing("gptq", 4, 32, 1), groups=torch.arange(64, dtype=torch.int32) % 2)
    assert torch.equal(layer.weight, wanted)


def test_layout_is_the_formats_own():
    """One code of the matrix moved: the number of the file and the bits of it that have to change."""
    for packing, index, shift in (
        (Packing("gptq", 4, 32, 1), (9 // 8, 5), 4 * (9 % 8)),  # inputs 8i to 8i + 7, lowest bits first
        (Packing("awq", 4, 32), (9, 5 // 8), 4 * AWQ_ORDER.index(5)),  # outputs 8i to 8i + 7, in AWQ's order
    ):
        codes = torch.zeros(16, 64, dtype=torch.int64)
        codes[5, 9] = 3
        held = packed_tensors(codes, torch.ones(16, 2), torch.ones(16, 2, dtype=torch.int64), packing)
        assert held["qweight"][index] == 3 << shift and held["qweight"].count_nonzero() == 1
        stored = 0 if packing.method == "gptq" else 1  # AutoGPTQ's first format stores zero - 1
        assert (unpack(held["qzeros"].t(), 4) == stored).all()


def test_a_folder_loads_packed_or_spelled_out(folders, method, tiny_folder):
    packed = load_base(str(folders[method]), method, FP32)
    plain = load_base(str(folders[method]), "fp32", FP32)
    kinds = {type(layer) for _, layer in linear_layers(packed.model)}
    assert kinds == {PackedLinear} and packed.info.precision == method
    assert {type(layer) for _, layer in linear_layers(plain.model)} == {torch.nn.Linear}
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        ours, theirs = packed.model(input_ids=ids).logits, plain.model(input_ids=ids).logits
        first = load_base(str(tiny_folder), "fp32", FP32).model(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert 0 < (ours - first).norm() < 0.15 * first.norm()
    assert packed.model.get_memory_footprint() < plain.model.get_memory_footprint()


@pytest.mark.parametrize("path", ["libraries", "fp32"])
def test_lora_gradients_are_the_slope_of_the_loss(folders, method, path):
    model = get_peft_model(
        load_base(str(folders[method]), method, FP32).model,
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    )
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    assert ("own decoder" in make_fast(model, path)) == (path == "fp32")
    ids = torch.arange(100, 140).view(2, 20)
    evaluated = model.eval()(input_ids=ids, labels=ids).loss.item()  # other readers repack here
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(evaluated, rel=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = torch.cat([p.grad.flatten() for p in trained]).norm()
    steps = {}
    for sign in (1, -1):
        with torch.no_grad():
            for p in trained:
                p.add_(p.grad / size, alpha=0.02 * sign)
            steps[sign] = model(input_ids=ids, labels=ids).loss.item()
            for p in trained:
                p.sub_(p.grad / size, alpha=0.02 * sign)
    assert (steps[1] - steps[-1]) / 0.04 == pytest.approx(size.item(), rel=0.05)


def test_a_script_trains_uses_and_merges(folders, tmp_path):
    base, out, merged = folders["gptq"], tmp_path / "run", tmp_path / "merged"
    done = here("qlora_finetune.py", "--model", base, "--output-dir", out, *SMALL_RUN)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["base"]["precision"] == "gptq" and "given), gptq" in done.stderr
    model = load_base(str(base), "gptq", FP32).model
    weights = sum(m.in_features * m.out_features for _, m in linear_layers(model))
    assert report["lora"]["all_parameters"] > weights
    assert trainable_and_all(PeftModel.from_pretrained(model, out))[1] == report["lora"]["all_parameters"]
    asked = here("qlora_inference.py", "--adapter", out, "A fine film.")
    assert asked.returncode == 0 and ", gptq" in asked.stderr
    done = here("qlora_inference.py", "--adapter", out, "--merge", merged)
    assert done.returncode == 0 and "original" not in done.stderr, done.stderr
    written = load_file(merged / "model.safetensors")
    assert all("qweight" not in key for key in written)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


@pytest.mark.parametrize(
    "tensor, value, said",
    [
        ("scales", float("inf"), "NaN or infinity in .*scales"),
        ("g_idx", 7, "g_idx names a group beyond the 2"),
    ],
)
def test_a_damaged_tensor_is_refused(folders, tmp_path, tensor, value, said):
    folder = tmp_path / "damaged"
    shutil.copytree(folders["gptq"], folder, ignore=shutil.ignore_patterns("complete.json"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{tensor}"].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        load_base(str(folder), "gptq", FP32)


def test_an_adapter_goes_through_a_grid_on_a_packed_base(folders, tmp_path):
    base, out = folders["gptq"], tmp_path / "run"
    done = here("qlora_finetune.py", "--model", base, "--qat", "Q4_0", "--output-dir", out, *SMALL_RUN)
    assert done.returncode == 0, done.stderr
    asked = here(
        "qlora_inference.py", "--adapter", out, "--merge", tmp_path / "m", "--merge-base", "original"
    )
    assert asked.returncode == 2 and "has no original weights" in asked.stderr
    refused = here(
        "qlora_finetune.py", "--model", base, "--lora-variant", "loftq", "--output-dir", tmp_path / "l"
    )
    assert refused.returncode == 2 and "gptq files do not hold that" in refused.stderr


def test_what_does_not_fit_is_said_in_a_line(folders, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="is quantized by gptq; leave --precision out, or choose bf16"):
        load_base(str(folders["gptq"]), "nf4", FP32)
    with pytest.raises(UserError, match="is not quantized by AWQ; python quant"):
        load_base(str(tiny_folder), "awq", FP32)
    for change, said in (
        ({"bits": 3}, "gptq as gptq, 3 bits"),
        ({"checkpoint_format": "marlin"}, "gptq as marlin"),
        ({"lm_head": True}, "the head as well"),
        ({"group_size": 48}, "groups of 48 do not divide the 64 inputs of model.layers.0.self_attn.q_proj"),
    ):
        folder = tmp_path / str(len(said))
        shutil.copytree(folders["gptq"], folder, ignore=shutil.ignore_patterns("complete.json"))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=said):
            load_base(str(folder), "gptq", FP32)


def test_linear_names_are_those_of_a_plain_model(folders, tiny_folder):
    model = load_base(str(folders["awq"]), "awq", FP32).model
    assert linear_names(model) == linear_names(load_base(str(tiny_folder), "fp32", FP32).model)
