"""Peak memory and speed of QLoRA training and generation at Llama's real shapes, with random weights.

    python benchmarks/gpu_shapes.py                      # 1B, 3B and 8B on the CUDA device; writes results/gpu_shapes.json
    python benchmarks/gpu_shapes.py --shapes tiny --device cpu     # that the script itself works, anywhere

Memory and speed do not depend on the values of weights, so no download and no account is needed. What is measured is
this repository's own path: NF4 with double quantization, LoRA r16 on all linear layers, loss at labelled positions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: E402,F401

LLAMA = dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5)
SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000),
    "llama-3.2-1b": dict(LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": dict(LLAMA, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128),
}
RUNS = [dict(batch=4, length=256, checkpointing=False), dict(batch=8, length=512, checkpointing=False), dict(batch=8, length=512, checkpointing=True)]


def random_nf4(shape: dict, device: str, dtype):
    """A LlamaForCausalLM whose linear layers are NF4 and never existed together in 16 bits."""
    import bitsandbytes as bnb
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    head = model.lm_head
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            four_bit = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
            weight = torch.randn(module.out_features, module.in_features, device=device, dtype=dtype) * 0.02
            four_bit.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(device)
            model.set_submodule(name, four_bit)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, torch.nn.Parameter(torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02 if parameter.dim() > 1 else torch.ones_like(parameter, device=device)))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True
    return model


def train_steps(model, device: str, batch: int, length: int, checkpointing: bool, hardware) -> dict:
    """Median of five steps after two; two supervised tokens a row, as in the sentiment objective."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    lm = model.get_base_model()
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}) if checkpointing else lm.gradient_checkpointing_disable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-4), torch.amp.GradScaler(device, enabled=hardware.dtype == torch.float16)
    model.train()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        with hardware.autocast():
            loss = model(input_ids=ids, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"tokens_per_second": batch * length / statistics.median(seconds[2:]), "peak_gb": peak, "finite": bool(torch.isfinite(loss))}


def generate(model, device: str, hardware, tokens: int = 64) -> dict:
    import torch

    model.eval()
    ids = torch.randint(0, model.config.vocab_size, (1, 128), device=device)
    with torch.inference_mode(), hardware.autocast():
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        started = time.perf_counter()
        model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return {"decode_tokens_per_second": tokens / (time.perf_counter() - started)}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen = flags.parse_args()

    import torch
    from peft import LoraConfig, get_peft_model

    from qlora.hardware import detect, environment
    from qlora.logits import loss_at_labels
    from qlora.lora import resolve_targets

    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; `--shapes tiny --device cpu` only shows that the script works")
    hardware = detect()
    rows = []
    for name in chosen.shapes:
        base = random_nf4(SHAPES[name], chosen.device, hardware.dtype)
        weights = base.get_memory_footprint() / 1e9
        loss_at_labels(base)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=resolve_targets(base, "all-linear")))
        for run in RUNS:
            try:
                result = train_steps(model, chosen.device, hardware=hardware, **run)
            except torch.OutOfMemoryError:
                result = {"out_of_memory": True}
            rows.append({"shape": name, "what": "train", **run, "weights_gb": weights, **result})
            print(rows[-1], flush=True)
        rows.append({"shape": name, "what": "generate", "weights_gb": weights, **generate(model, chosen.device, hardware)})
        print(rows[-1], flush=True)
        del model, base
        if chosen.device == "cuda":
            torch.cuda.empty_cache()
    if chosen.device == "cuda":
        out = Path(__file__).parent / "results" / "gpu_shapes.json"
        out.write_text(json.dumps({"environment": environment(hardware), "rows": rows}, indent=2) + "\n")
        print(f"written {out}")


if __name__ == "__main__":
    main()
