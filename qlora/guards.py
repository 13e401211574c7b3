"""Is this run healthy? Each guard names what it looked at and, when it fires, the fix.

Every one of them stands for a bug that ruins a run while the loss looks fine; tests/test_guards.py plants each bug.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from pathlib import Path

import torch

from qlora.cli import UserError
from qlora.data import collate
from qlora.logits import causal_lm, hidden_states
from qlora.prompts import IGNORE


class GuardError(UserError):
    """A guard fired: the run is not healthy."""


class Guards:
    """Collects what was checked, for report.json; `check` raises when it did not hold."""

    def __init__(self):
        self.results: list[dict] = []

    def check(self, name: str, passed: bool, detail: str, fix: str) -> None:
        self.results.append({"name": name, "passed": bool(passed), "detail": detail})
        if not passed:
            raise GuardError(f"guard '{name}': {detail}; {fix}")


def labels_present(guards: Guards, examples: list[dict]) -> None:
    empty = sum(all(label == IGNORE for label in e["labels"][1:]) for e in examples)
    guards.check(
        "labels_present", not empty and bool(examples), f"{len(examples) - empty} of {len(examples)} rows have supervised tokens",
        "rows whose labels are all masked teach nothing: raise --max-length or check the dataset's answers",
    )


def end_supervised(guards: Guards, examples: list[dict], end_ids: set[int]) -> None:
    """The last supervised token of an answer must be an end token, or the model never learns to stop."""
    def last(example):
        return next((label for label in reversed(example["labels"]) if label != IGNORE), None)

    ended = sum(last(e) in end_ids for e in examples)
    guards.check(
        "end_supervised", ended == len(examples), f"{ended} of {len(examples)} answers end with a supervised end token",
        "the end token was masked or cut off (is it also the pad token?): mask by position, and leave room in --max-length",
    )


def probe_batch(model, examples: list[dict]) -> dict:
    """The two shortest rows, on the model's device: enough to see a bug, cheap enough to look often."""
    device = next(model.parameters()).device
    batch = collate(sorted(examples, key=lambda e: len(e["input_ids"]))[:2], 0)
    return {name: batch[name].to(device) for name in ("input_ids", "labels")}


def frozen_hash(model) -> str:
    """sha256 over the bytes of every parameter and buffer that is not trained."""
    digest = hashlib.sha256()
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if "lora_" in name or tensor.requires_grad:
            continue
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    for name, module in model.named_modules():
        if isinstance(getattr(module, "dequantized", None), torch.Tensor):  # the copy that a CPU multiplies with
            digest.update(_bytes(module.dequantized))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()


def base_unchanged(guards: Guards, before: str, model) -> None:
    guards.check(
        "base_unchanged", frozen_hash(model) == before, f"sha256 of all frozen bytes, before and after: {before[:12]}…",
        "something wrote into the frozen base; the adapter does not fit the weights on disk",
    )


@torch.no_grad()
def last_logits(model, input_ids, autocast) -> torch.Tensor:
    """Logits (batch, vocabulary) after each row's last position, in evaluation mode."""
    model.eval()
    with autocast():
        hidden = hidden_states(model, input_ids, use_cache=False).last_hidden_state[:, -1]
        return causal_lm(model).get_output_embeddings()(hidden).float()


def starts_as_base(guards: Guards, model, input_ids, autocast, exact: bool) -> None:
    """B starts at zero, so step 0 must reproduce the frozen base (DoRA divides by a norm: only nearly)."""
    with_adapter = last_logits(model, input_ids, autocast)
    with model.disable_adapter():
        base = last_logits(model, input_ids, autocast)
    gap = (with_adapter - base).abs().max().item()
    limit = 0.0 if exact else 0.05 * base.abs().max().item()
    guards.check(
        "starts_as_base", gap <= limit, f"largest difference of logits at step 0: {gap:.3g} (allowed {limit:.3g})",
        "the adapter changes the model before any training: is an old adapter loaded, or B not zero?",
    )


def nothing_repacked(guards: Guards, model, batch: dict, autocast) -> None:
    """Gradients before and after an evaluation must be the same (bitsandbytes' CPU kernel once broke exactly that)."""
    before = _gradients(model, batch, autocast)
    last_logits(model, batch["input_ids"], autocast)
    after = _gradients(model, batch, autocast)
    same = before.keys() == after.keys()  # a matrix may lose its gradient altogether
    change = max((norm_of_difference(before[n], after[n]) for n in before), default=math.inf) if same else math.inf
    states = (getattr(getattr(m, "weight", None), "quant_state", None) for m in model.modules())
    packed = [state for state in states if getattr(state, "packing_format_for_cpu", False)]
    guards.check(
        "nothing_repacked", change <= 1e-2 and not packed, f"an evaluation changed LoRA gradients by {change:.2g} (relative); {len(packed)} layers repacked",
        "4-bit weights were repacked for inference; set support_avx512bf16_for_cpu = False on every Linear4bit after loading",
    )


def norm_of_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / a.norm().clamp_min(1e-12)).item()


def _gradients(model, batch, autocast) -> dict[str, torch.Tensor]:
    """Gradient of each trained matrix, of B only while B is zero (A's gradient is zero then)."""
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(), autocast():
        torch.manual_seed(0)  # the same dropout both times
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    (loss * 1024).backward()  # so that fp16 gradients do not underflow; the scale drops out of the comparison
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    model.zero_grad(set_to_none=True)
    return found


def loss_is_models_own(guards: Guards, model, batch: dict, autocast) -> None:
    """The loss made from labelled positions only must be what the model's own forward gives."""
    with torch.no_grad(), autocast():
        model.eval()
        short = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        full = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE).item()
    guards.check(
        "loss_is_models_own", abs(short - full) <= 0.02 * max(1.0, abs(full)), f"loss at labelled positions {short:.4f}, by the model's own logits {full:.4f}",
        "this architecture treats its logits specially (softcapping, scaling): qlora/logits.py has to follow it",
    )


def all_matrices_learn(guards: Guards, model) -> None:
    """After the first update and a second backward pass: each A and B has a gradient, each B has left zero."""
    lora = {n: p for n, p in model.named_parameters() if p.requires_grad}
    silent = [n for n, p in lora.items() if p.grad is None or not p.grad.abs().max() > 0]
    zero = [n for n, p in lora.items() if "lora_B" in n and not p.detach().abs().max() > 0]
    guards.check(
        "all_matrices_learn", bool(lora) and not silent and not zero,
        f"{len(lora) - len(silent)} of {len(lora)} matrices got a gradient, {len(zero)} B still zero" + (f" (first: {(silent + zero)[0]})" if silent or zero else ""),
        "the loss does not reach these matrices: is the model in training mode, is anything detached, do all modules take part?",
    )


def finite(guards: Guards, value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        guards.check(
            "finite", False, f"{what} is {value} at step {step}",
            "start again with --overwrite and a lower --learning-rate; on GPUs without bf16 (T4) fp16 can overflow: try --precision fp32 or a smaller model",
        )


def all_finite(guards: Guards, history: list[dict]) -> None:
    """The record of a run in which `finite` never fired."""
    guards.check("finite", True, f"the loss of {len(history)} steps", "")


def reloads_same(guards: Guards, model, folder: Path, input_ids, autocast) -> None:
    """The adapter read back from disk must give the logits of the one in memory."""
    here = last_logits(model, input_ids, autocast)
    model.load_adapter(str(folder), adapter_name="reloaded", is_trainable=False)
    with contextlib.ExitStack() as after:
        after.callback(lambda: (model.set_adapter("default"), model.delete_adapter("reloaded")))
        model.set_adapter("reloaded")
        there = last_logits(model, input_ids, autocast)
    gap = (here - there).abs().max().item()
    guards.check(
        "reloads_same", gap <= 1e-3 * here.abs().max().item(), f"largest difference of logits after saving and loading: {gap:.3g}",
        "what was saved is not what was trained: check adapter_model.safetensors",
    )
