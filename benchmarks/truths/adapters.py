"""LoRA as PEFT computes it, on small layers and a random two-layer Llama."""

from __future__ import annotations

import copy
import math

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from qlora.measures import relative_error
from truths import Truth, recorded, small, tiny_llama, tokens

R, ALPHA = 8, 32


def with_lora(model, targets=("q_proj", "v_proj"), **options):
    """PEFT's model; B stays zero until noise() fills it."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(targets), **options))


def noise(peft) -> list[tuple[str, LoraLayer]]:
    """Fill every B, as training would; returns the layers by name."""
    layers = [(name, m) for name, m in peft.named_modules() if isinstance(m, LoraLayer)]
    for _, layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return layers


@torch.no_grad()
def scale_and_shapes() -> Truth:
    """PEFT adds alpha/r B A x (rsLoRA: alpha/sqrt(r)); A is r x in, B is out x r."""
    x, errors = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), {}
    for rslora in (False, True):
        torch.manual_seed(0)
        peft = with_lora(torch.nn.Sequential(torch.nn.Linear(48, 80, bias=False)), ["0"], use_rslora=rslora)
        [(_, layer)] = noise(peft)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for rule, scale in (
            ("alpha/r", ALPHA / R),
            ("alpha/sqrt(r)", ALPHA / math.sqrt(R)),
            ("alpha", ALPHA),
        ):
            errors[rslora, rule] = relative_error(layer(x), layer.get_base_layer()(x) + scale * x @ a.T @ b.T)
    plain, rooted = errors[False, "alpha/r"], errors[True, "alpha/sqrt(r)"]
    wrong, shapes = errors[False, "alpha"], (tuple(a.shape), tuple(b.shape))
    text = f"in 48, out 80, r {R}: A {R} x 48, B 80 x {R}; W x + alpha/r B A x is PEFT's output (error "
    text += f"{small(plain)}), alpha instead of alpha/r is {wrong:.0%} off; "
    text += f"rsLoRA: alpha/sqrt(r), {small(rooted)}"
    return Truth(max(plain, rooted) < 1e-6 and shapes == ((R, 48), (80, R)) and wrong > 0.1, text)


@torch.no_grad()
def untrained_is_the_base() -> Truth:
    """A is random, B is zero: nothing changes before the first step."""
    model, ids = tiny_llama(), tokens(4, 16)
    before = model(input_ids=ids).logits
    peft = with_lora(model)
    a, b = (torch.cat([p.flatten() for n, p in peft.named_parameters() if f"lora_{m}" in n]) for m in "AB")
    same = torch.equal(peft(input_ids=ids).logits, before)
    text = f"A has a standard deviation of {a.std():.3f}, B of {b.std():g}: logits are "
    return Truth(same and a.std() > 0, text + ("the base's, bit for bit" if same else "not the base's"))


@torch.no_grad()
def merging() -> Truth:
    """W + alpha/r B A is the trained model; W + B A is another one; so is a merge into other weights."""
    ids, base = tokens(4, 16), tiny_llama()
    peft = with_lora(copy.deepcopy(base))
    layers, trained = noise(peft), peft(input_ids=ids).logits
    error = {}
    for way, scale, dtype in (
        ("right", ALPHA / R, None),
        ("no alpha/r", 1.0, None),
        ("other base", ALPHA / R, "bf16"),
    ):
        merged = copy.deepcopy(base.bfloat16().float() if dtype else base)
        for name, layer in layers:
            weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        error[way] = relative_error(merged(input_ids=ids).logits, trained)
    text = f"logits against the trained model's: W + alpha/r B A {small(error['right'])}, W + B A "
    text += f"{error['no alpha/r']:.0%} off, into weights rounded to bf16 {error['other base']:.1%} off"
    return Truth(error["right"] < 1e-5 and error["no alpha/r"] > 0.01 and error["other base"] > 1e-4, text)


def no_w_o_in_llama() -> Truth:
    """Alone it is an error; in a list it is left out without a word."""
    try:
        with_lora(tiny_llama(), ["w_o"])
        alone = "no error"
    except ValueError as error:
        alone = type(error).__name__
    peft = with_lora(tiny_llama(), ["q_proj", "w_o"])
    found = {name.rsplit(".", 1)[-1] for name, m in peft.named_modules() if isinstance(m, LoraLayer)}
    text = (
        f"target_modules=['w_o']: {alone}; ['q_proj', 'w_o'] adapts {', '.join(found)} alone, without a word"
    )
    return Truth(alone != "no error" and found == {"q_proj"}, text + "; Llama's output projection is o_proj")


def alpha_and_rate() -> Truth:
    """alpha is a second knob of the rate: with Adam, half of it at twice the rate is the same first step."""
    updates = []
    for alpha, rate in ((ALPHA, 1e-3), (ALPHA // 2, 2e-3)):
        torch.manual_seed(0)
        layer = torch.nn.Linear(32, 32, bias=False)
        config = LoraConfig(r=R, lora_alpha=alpha, target_modules=["0"])
        peft = get_peft_model(torch.nn.Sequential(layer), config)
        b, a = (peft.get_submodule(f"base_model.model.0.lora_{m}.default").weight for m in "BA")
        optimizer = torch.optim.Adam([b], lr=rate, eps=1e-30)
        peft(torch.ones(4, 32)).square().sum().backward()
        optimizer.step()
        updates.append((alpha / R * b @ a).detach())
    same = relative_error(updates[1], updates[0])
    found, name = recorded("variants.json")
    rates = next(v["at_rate"] for v in found["variants"] if (v["variant"], v["precision"]) == ("lora", "nf4"))
    said = ", ".join(f"{share:.1%} at {float(rate):g}" for rate, share in rates.items())
    text = f"alpha {ALPHA} at 1e-3 and {ALPHA // 2} at 2e-3: the first update of W differs by {small(same)}; "
    text += f"accuracy of the same LoRA: {said}"
    spread = max(rates.values()) - min(rates.values())
    return Truth(same < 1e-5 and spread > 0.05, text, f"measured here, and {name}")


def forgetting() -> Truth:
    """The base is intact only while the adapter is off; a model with its adapter on forgets."""
    old, new = (tokens(8, 12, seed) for seed in (1, 2))  # two texts that a toy model learns by heart
    model = tiny_llama()

    def learn(module, ids, steps, rate):
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            module(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    def loss(module, ids):
        with torch.no_grad():
            return module(input_ids=ids, labels=ids).loss.item()

    learn(model, old, 60, 3e-3)
    before = loss(model, old)
    peft = with_lora(model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    learn(peft, new, 60, 1e-2)
    after = loss(peft, old)
    with peft.disable_adapter():
        off = loss(peft, old)
    text = f"toy model, loss on what it knew: {before:.2f}; {after:.2f} once LoRA learned another text; "
    return Truth(after > before + 1 and off == before, text + f"{off:.2f} with the adapter off")
