"""Parameters and bytes, counted on real shapes (qlora/shapes.json) without any weights."""

from __future__ import annotations

from functools import cache

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from qlora.lab.ledger import lora_parameters
from qlora.shapes import SHAPES, skeleton
from truths import Truth, recorded

NF4_BITS = (
    4 + 8 / 64 + 32 / (64 * 256)
)  # double quantization: a byte for 64 weights, 4 bytes for 256 of these
COURSE_MODEL = "llama-3.2-3b"


@cache
def frame(name: str):
    return skeleton(AutoConfig.for_model(**SHAPES[name]))


@cache
def parts(name: str) -> tuple[int, int]:
    """(parameters in the linear layers of the decoder, all others)"""
    model = frame(name)
    linear = [m for key, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in key]
    inside = sum(module.weight.numel() for module in linear)
    return inside, model.num_parameters() - inside


def gigabytes(name: str, bits: float) -> float:
    """With the linear layers at so many bits; the rest in 16, or in 32 where all is in 32."""
    inside, others = parts(name)
    return (inside * bits + others * (32 if bits == 32 else 16)) / 8e9


def count_on_q_and_v() -> Truth:
    """PEFT's own count of r 16 on q_proj and v_proj of Llama 3.2 3B."""
    model = skeleton(AutoConfig.for_model(**SHAPES[COURSE_MODEL]))
    with torch.device("meta"):
        peft = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    trainable, total = peft.get_nb_trainable_parameters()
    by_hand = 28 * 16 * ((3072 + 3072) + (3072 + 1024))
    share = f"{100 * trainable / total:.2f}%"
    text = f"PEFT counts {trainable:,} = 28 x 16 x ((3072 + 3072) + (3072 + 1024)), {share} of {total:,}"
    return Truth(trainable == by_hand != 8_388_608, text)


def four_bit_model() -> Truth:
    """Only the linear layers are held in 4 bits."""
    inside, others = parts(COURSE_MODEL)
    size, full = gigabytes(COURSE_MODEL, NF4_BITS), gigabytes(COURSE_MODEL, 32)
    stay = f"{others / 1e6:.0f} million stay in 16 bits ({2 * others / 1e9:.2f} GB)"
    text = f"{inside / 1e9:.2f} billion parameters at {NF4_BITS:.3f} bits, {stay}: {size:.2f} GB, "
    return Truth(2.2 < size < 2.3 and full / size < 6, text + f"{full / size:.1f} times less than fp32")


def shrinking() -> Truth:
    """What 8 and 4 bits take off the linear layers, and off the model."""
    linear = {bits: 1 - bits / 32 for bits in (8, NF4_BITS)}
    whole = {bits: 1 - gigabytes(COURSE_MODEL, bits) / gigabytes(COURSE_MODEL, 32) for bits in linear}
    says = [f"{'NF4' if bits < 8 else 'int8'}: {linear[bits]:.0%} and {whole[bits]:.0%}" for bits in linear]
    text = f"off the linear layers and off the whole model: {'; '.join(says)}"
    return Truth(abs(linear[8] - 0.75) < 1e-9 and whole[NF4_BITS] > 0.8, text)


def memory_against_parameters() -> Truth:
    """Few trainable parameters shrink gradients and optimizer; the base and the activations stay."""
    total, trained = sum(parts(COURSE_MODEL)), lora_parameters(frame(COURSE_MODEL), 16, "q_proj,v_proj")
    full = 16 * total / 1e9  # fp32: weight, gradient, AdamW's two moments
    qlora = gigabytes(COURSE_MODEL, NF4_BITS) + 16 * trained / 1e9
    text = (
        f"{total / trained:.0f} times fewer trainable parameters, but weights, gradients and AdamW's moments "
    )
    text += f"go from {full:.1f} to {qlora:.2f} GB: {full / qlora:.0f} times; activations come on top"
    return Truth(full / qlora < 100, text)


def adapter_size() -> Truth:
    """Rank 32 on the four attention matrices, in fp32."""
    models = (COURSE_MODEL, "llama-3.1-8b")
    sizes = {name: 4e-6 * lora_parameters(frame(name), 32, "attention") for name in models}
    text = ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items())
    return Truth(all(size > 70 for size in sizes.values()), f"rank 32 on attention in fp32: {text}")


def largest_adapter() -> Truth:
    """The course's own full mode: rank 256 on all seven matrices."""
    added, base = lora_parameters(frame(COURSE_MODEL), 256, "all-linear"), sum(parts(COURSE_MODEL))
    text = f"r 256 on all seven: {added:,} parameters, {added / (base + added):.1%} of base and adapter, "
    return Truth(added / (base + added) > 0.1, text + f"{4 * added / 1e9:.2f} GB in fp32")


def seventy_billion() -> Truth:
    """The plan of Llama 3.1 70B, one row at a time with gradient checkpointing."""
    found, name = recorded("plan_70b.json")
    plan = found["plan"]["result"]
    cards = {card["card"]: card for card in plan["cards"]}
    fits, largest = [key for key, card in cards.items() if card["fits"]], cards["RTX 4090 24"]
    weights = plan["footprints"]["nf4"]["total"] / 1e9
    text = f"NF4 weights {weights:.1f} GB, a step {largest['peak'] / 1e9:.1f} GB; an RTX 4090 has "
    text += f"{largest['capacity'] / 1e9:.1f}; of the planned cards it fits {', '.join(fits)}"
    return Truth(bool(fits) and not any("RTX" in key for key in fits), text, name)


def seven_million_parameters() -> Truth:
    """Bytes are parameters times bytes each."""
    size = 7_164_992 * 4 / 1e6
    text = f"7,164,992 x 4 bytes = {size:.1f} MB; 2.54 MB would be {2.54e6 / 4:,.0f} parameters in fp32"
    return Truth(size > 10 * 2.54, text)
