"""What was measured before and lies in benchmarks/results, and what can't be measured here."""

from __future__ import annotations

import torch

from qlora.measures import wilson
from qlora.memory.plan import CARDS
from truths import DOCUMENTED, Truth, recorded


def bf16_of_a_t4() -> Truth:
    """bf16 arithmetic begins with compute capability 8.0."""
    (major, minor), needed = CARDS["T4 16"][1], (8, 0)
    text = f"NVIDIA's list: a T4 has compute capability {major}.{minor}; bf16 arithmetic begins with 8.0"
    return Truth((major, minor) < needed, text, DOCUMENTED)


def speed() -> Truth:
    """Quantization buys memory; on this CPU a 4-bit model answers more slowly than fp32."""
    found, name = recorded("methods_*.json")
    row = next(r for r in found["rows"] if (r["method"], r["base"], r["by"]) == ("QLoRA", "nf4", "libraries"))
    rows, lab = recorded("lab/quantization.json")
    decode = {r["precision"]: r.get("decode_tokens_per_second") for r in rows["compare"]["result"]["rows"]}
    train, forward = row["faster_training"], row["faster_inference"]
    text = f"on a CPU, by the usual libraries, QLoRA trains {train:.1f} times as fast as fp32, a forward "
    text += f"pass is {forward:.2f} times as fast; tokens written a second: fp32 {decode['fp32']:.1f}, "
    text += f"bf16 {decode['bf16']:.1f}, int8 {decode['int8']:.1f}, NF4 {decode['nf4-dq']:.1f}"
    slower = decode["nf4-dq"] < decode["fp32"] and forward < 1 and train < 4
    return Truth(slower, text, f"{name}, {lab}")


def accuracy_on_imdb() -> Truth:
    """The best run here, and what few rows can prove."""
    found, name = recorded("long_run_8000.json")
    tuned = found["evaluation"]["tuned"]
    interval = f"{tuned['low']:.1%} to {tuned['high']:.1%}"
    text = f"best run here: {tuned['accuracy']:.1%} ({interval}) of {tuned['rows']:,} held-out rows; "
    text += f"all of 20 rows right would only mean {wilson(20, 20)[0]:.1%} or more"
    return Truth(tuned["high"] < 0.97, text, name)


def gptq_against_nf4() -> Truth:
    """At about the same number of bits a calibrated code loses less than NF4."""
    found, name = recorded("lab/quantization.json")
    rows = {row["precision"]: row for row in found["compare"]["result"]["rows"]}
    gptq, nf4, full = (rows[key] for key in ("gptq", "nf4-dq", "fp32"))
    bits = gptq["bits_linear"]
    text = f"perplexity fp32 {full['perplexity']:.1f}, GPTQ {gptq['perplexity']:.1f} at {bits:.2f} bits, NF4 "
    text += f"{nf4['perplexity']:.1f} at {nf4['bits_linear']:.2f}; GPTQ's linear layers are {32 / bits:.1f} "
    text += "times smaller than fp32's"
    return Truth(gptq["perplexity"] < nf4["perplexity"] and bits > 4, text, name)


def training_in_four_bits() -> Truth:
    """NF4's codes take no gradient; arithmetic in FP4 exists on the newest GPUs."""
    try:
        torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=True)
        refused = False
    except RuntimeError:
        refused = True
    text = (
        "NF4 codes are uint8, which torch gives no gradient; NVFP4 training on Blackwell GPUs is published "
    )
    return Truth(refused, text + "(arXiv 2509.25149)", DOCUMENTED)


def base_under_an_adapter() -> Truth:
    """An adapter belongs to the values that it was trained on."""
    found, name = recorded("parity/nf4/parity.json")
    rungs = {rung["name"]: rung for rung in found["rungs"]}
    own, other = rungs["merged 16 bit"], rungs["base + LoRA"]
    text = f"same labels as the trained model: merged into its own base {own['agreement']:.1%} (KL "
    text += f"{own['kl']['mean']:.1g} nats), on the same model in Q4_1 {other['agreement']:.1%} (KL "
    text += f"{other['kl']['mean']:.2g})"
    return Truth(other["kl"]["mean"] > 10 * own["kl"]["mean"], text, name)
