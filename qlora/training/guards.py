"""Is this run healthy? Each guard names what it looked at and, when it fires, the fix.

Each stands for a bug that ruins a run while the loss looks fine; tests/training/test_guards.py plants the
bugs. check_data, check_start, check_step, check_training and check_end say when a guard looks: a new one is a
function here, a line in one of these, and its fix in FIXES.
"""

import hashlib
import math
from pathlib import Path

import torch

from qlora import qat
from qlora.batches import collate
from qlora.cli import UserError, note
from qlora.logits import IGNORE, causal_lm, last_logits
from qlora.measures import relative_error
from qlora.prompts import PromptFormat, end_ids
from qlora.training.preferences import pairs_differ, starts_at_log_2
from qlora.variants import Start

# What to do when a guard fires.
FIXES = {
    "labels_present": "such rows teach nothing: raise --max-length or check the dataset's answers",
    "end_supervised": "end token masked or cut off: mask by position, not by token id; raise --max-length",
    "starts_as_base": "the adapter changes the model before training: is an old one loaded, or B not zero?",
    "starts_nearer": "LoftQ's A and B make up for nothing: is the base on the disk still the same?",
    "starts_as_initial": "what would be trained is not --init-adapter's: check its adapter_model.safetensors",
    "pairs_differ": "such pairs teach nothing: qlora/batches.py has to leave them out",
    "starts_at_log_2": "the reference is of another model: start again with --overwrite",
    "loss_is_models_own": "qlora/logits.py must do what this model does to its logits (softcap? scaling?)",
    "nothing_repacked": "4-bit weights were repacked: call qlora.loading.never_repack after loading",
    "all_matrices_learn": "is the model in training mode, is anything detached, do all modules take part?",
    "updates_applied": "the gradients overflow in fp16 whatever the scale: start again with --overwrite and "
    "--precision fp32, or a smaller model",
    "finite": "start again with --overwrite and a lower --learning-rate; on GPUs without bf16 (T4) fp16 can "
    "overflow: try --precision fp32 or a smaller model",
    "base_unchanged": "something wrote into the frozen base: the adapter does not fit the weights on disk",
    "reloads_same": "what was saved is not what was trained: check adapter_model.safetensors",
}


class GuardError(UserError):
    """A guard fired: the run is not healthy."""


class Guards:
    """Collects what was checked, for report.json; `check` raises when it did not hold."""

    def __init__(self):
        self.results: list[dict] = []

    def check(self, name: str, passed: bool, detail: str) -> None:
        self.results = [r for r in self.results if r["name"] != name]  # an earlier process's
        self.results.append({"name": name, "passed": bool(passed), "detail": detail})
        if not passed:
            raise GuardError(f"guard '{name}': {detail}; {FIXES[name]}")

    def of(self, name: str) -> list[dict]:
        return [r for r in self.results if r["name"] == name]


def check_data(guards: Guards, tokenizer, prompt: PromptFormat, train: list[dict]) -> None:
    """Before the base is scored: what will be trained on."""
    labels_present(guards, train)
    if prompt.objective != "lm":  # plain text may be cut before its end
        end_supervised(guards, train, end_ids(tokenizer))
    if "asked" in train[0]:
        pairs_differ(guards, train)


def check_start(guards: Guards, model, train: list[dict], autocast, start: Start) -> str:
    """Before the first step; returns the hash of the frozen base."""
    probe = probe_batch(model, train)
    if start.initial:
        starts_as_initial(guards, model, start.initial, probe["input_ids"], autocast)
    elif start.distances:
        starts_nearer(guards, start.distances)
    elif start.untouched:
        starts_as_untouched(guards, model, probe["input_ids"], autocast, start.untouched())
    else:
        exact = start.variant.start == "base"
        starts_as_base(guards, model, probe["input_ids"], autocast, exact)
    loss_is_models_own(guards, model, probe, autocast)
    nothing_repacked(guards, model, probe, autocast)
    if "reference" in train[0]:
        starts_at_log_2(guards, model, train, autocast)
    return frozen_hash(model)


def check_step(guards: Guards, logs: dict, step: int, scaled: bool) -> None:
    """After each update. With a gradient scaler (fp16) the first steps overflow by design and are skipped."""
    for name in ("loss",) if scaled else ("loss", "grad_norm"):
        if not math.isfinite(value := float(logs.get(name, 0.0))):
            guards.check("finite", False, f"{name} is {value} at step {step}")


def check_training(guards: Guards, losses: list[float], applied: int) -> None:
    """After the last step: what the whole run's steps did, those of earlier processes included."""
    all_finite(guards, losses)
    updates_applied(guards, applied, len(losses))
    if not guards.of("all_matrices_learn"):
        looks = "looks after two applied updates, in a step without overflow; no process came to that"
        note(f"note       guard 'all_matrices_learn' {looks}: this run is not judged by it")


def check_end(guards: Guards, model, train: list[dict], autocast, saved: tuple[Path, str, Start]) -> None:
    """After training; `saved`: (folder that the adapter was saved to, hash of the frozen base, its start)."""
    folder, frozen, start = saved
    base_unchanged(guards, frozen, model)
    probe = probe_batch(model, train)["input_ids"]
    if start.untouched:
        reloads_on_untouched(guards, model, probe, autocast, start.untouched(folder))
    else:
        reloads_same(guards, model, folder, probe, autocast)


def labels_present(guards: Guards, examples: list[dict]) -> None:
    count, empty = len(examples), sum(all(label == IGNORE for label in e["labels"][1:]) for e in examples)
    detail = f"{count - empty} of {count} rows have supervised tokens"
    guards.check("labels_present", count > 0 and not empty, detail)


def end_supervised(guards: Guards, examples: list[dict], end_ids: set[int]) -> None:
    """The last supervised token of an answer must be an end token, or the model never learns to stop."""
    last = [next((label for label in reversed(e["labels"]) if label != IGNORE), None) for e in examples]
    ended = sum(label in end_ids for label in last)
    detail = f"{ended} of {len(examples)} answers end with a supervised end token"
    guards.check("end_supervised", ended == len(examples), detail)


def starts_as_base(guards: Guards, model, input_ids, autocast, exact: bool) -> None:
    """B starts at zero, so step 0 must reproduce the frozen base (DoRA divides by a norm: only nearly).

    The grid of --qat moves the base at step 0. It is left out here: it would also hide a small B.
    """
    with qat.without_grid(model):
        with_adapter = last_logits(model, input_ids, autocast)
        with model.disable_adapter():
            base = last_logits(model, input_ids, autocast)
    gap = (with_adapter - base).abs().max().item()
    limit = 0.0 if exact else 0.05 * base.abs().max().item()
    detail = f"largest difference of logits at step 0: {gap:.3g} (allowed {limit:.3g})"
    guards.check("starts_as_base", gap <= limit, detail)


def starts_as_untouched(guards: Guards, model, input_ids, autocast, untouched) -> None:
    """PiSSA and OLoRA take s B A off the frozen weights: both together must be the base on the disk."""
    base = last_logits(untouched, input_ids, autocast)
    gap, limit = _gap(last_logits(model, input_ids, autocast), base, _rounding(model))
    detail = f"logits at step 0 are off the untouched base's by {gap:.3g} (allowed {limit:.3g})"
    guards.check("starts_as_base", gap <= limit, detail)


def starts_nearer(guards: Guards, distances: dict[str, tuple[float, float]]) -> None:
    """LoftQ begins between the quantized base and the original weights: nearer to these in every layer."""
    farther = [name for name, (without, with_it) in distances.items() if not with_it < without]
    without, with_it = (sum(column) / len(distances) for column in zip(*distances.values()))
    change = f"weights are off the original ones by {without:.2%}, with A and B by {with_it:.2%}"
    first = f"; no nearer in {len(farther)} layers (first: {farther[0]})" if farther else ""
    guards.check("starts_nearer", not farther, change + first)


def loss_is_models_own(guards: Guards, model, batch: dict, autocast) -> None:
    """The loss made from labelled positions only must be what the model's own forward gives."""
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad(), autocast():
        model.eval()
        short = model(input_ids=ids, labels=labels).loss.item()
        logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
    full = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE).item()
    detail = f"loss at labelled positions {short:.4f}, by the model's own logits {full:.4f}"
    guards.check("loss_is_models_own", abs(short - full) <= 0.02 * max(1.0, abs(full)), detail)


def nothing_repacked(guards: Guards, model, batch: dict, autocast) -> None:
    """Gradients before and after an evaluation must be equal; bitsandbytes' CPU kernel once broke that."""
    before = _gradients(model, batch, autocast)
    last_logits(model, batch["input_ids"], autocast)
    after = _gradients(model, batch, autocast)
    change = math.inf  # a matrix may lose its gradient altogether
    if before and before.keys() == after.keys():
        change = max(relative_error(before[name], after[name]) for name in before)
    states = (getattr(getattr(m, "weight", None), "quant_state", None) for m in model.modules())
    packed = sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states)
    detail = f"an evaluation changed LoRA gradients by {change:.2g} (relative); {packed} layers repacked"
    guards.check("nothing_repacked", change <= 1e-2 and not packed, detail)


def all_matrices_learn(guards: Guards, model) -> None:
    """After an update and another backward pass: each A and B has a gradient, each B has left zero."""
    lora = {n: p for n, p in model.named_parameters() if p.requires_grad}
    silent = [n for n, p in lora.items() if p.grad is None or not p.grad.abs().max() > 0]
    zero = [n for n, p in lora.items() if "lora_B" in n and not p.detach().abs().max() > 0]
    first = f" (first: {(silent + zero)[0]})" if silent or zero else ""
    detail = f"{len(lora) - len(silent)} of {len(lora)} matrices got a gradient, {len(zero)} B still zero"
    guards.check("all_matrices_learn", lora and not silent and not zero, detail + first)


def all_finite(guards: Guards, losses: list[float]) -> None:
    """What check_step() saw, for the whole run."""
    count = sum(map(math.isfinite, losses))
    guards.check("finite", count == len(losses), f"the loss of {count} of {len(losses)} steps is finite")


def updates_applied(guards: Guards, applied: int, steps: int) -> None:
    """A gradient scaler (fp16) skips updates whose gradients overflowed; skipping them all is no training."""
    skipped = "" if applied == steps else ", the others skipped: their gradients were not finite"
    guards.check("updates_applied", applied > 0, f"{applied} of {steps} updates were applied{skipped}")


def base_unchanged(guards: Guards, before: str, model) -> None:
    detail = f"sha256 of all frozen bytes, before and after: {before[:12]}…"
    guards.check("base_unchanged", frozen_hash(model) == before, detail)


def reloads_same(guards: Guards, model, folder: Path, input_ids, autocast) -> None:
    """The adapter read back from disk must give the logits of the one in memory."""
    gap, limit = _gap(*_here_and_on_disk(model, folder, input_ids, autocast), 1e-3)
    detail = f"largest difference of logits after saving and loading: {gap:.3g}"
    guards.check("reloads_same", gap <= limit, detail)


def starts_as_initial(guards: Guards, model, folder: Path, input_ids, autocast) -> None:
    """A run that goes on from an adapter starts with the logits of that adapter, loaded by PEFT alone."""
    here, there = _here_and_on_disk(model, folder, input_ids, autocast)
    gap, limit = _gap(here, there, 1e-5)
    detail = f"logits at step 0 are off the initial adapter's by {gap:.3g} (allowed {limit:.3g})"
    guards.check("starts_as_initial", gap <= limit, detail)


def _here_and_on_disk(model, folder: Path, input_ids, autocast) -> tuple:
    """Logits of the adapter in memory, and of the one in `folder` in its place."""
    here = last_logits(model, input_ids, autocast)
    model.load_adapter(str(folder), adapter_name="reloaded", is_trainable=False)
    qat.use_grid(model, "reloaded", qat.grid_of(model, "default"))
    try:
        model.set_adapter("reloaded")
        there = last_logits(model, input_ids, autocast)
    finally:
        model.set_adapter("default")
        qat.use_grid(model, "reloaded", None)
        model.delete_adapter("reloaded")
    return here, there


def reloads_on_untouched(guards: Guards, model, input_ids, autocast, reloaded) -> None:
    """What was converted to plain LoRA, on a fresh base, must give the logits of the model in memory."""
    here = last_logits(model, input_ids, autocast)
    gap, limit = _gap(here, last_logits(reloaded, input_ids, autocast), _rounding(model))
    detail = f"as plain LoRA on the untouched base the logits differ by {gap:.3g} (allowed {limit:.3g})"
    guards.check("reloads_same", gap <= limit, detail)


def _rounding(model) -> float:
    """What a frozen weight without a part of it, rounded to its own dtype, may move the logits by (relative).

    Measured on the bundled model: 2e-6 in fp32, 0.01 in bf16; 0.04 where layers are computed in bf16, too.
    """
    return max(1e-3, 8 * torch.finfo(causal_lm(model).dtype).eps)


def _gap(given, other, share: float) -> tuple[float, float]:
    """(largest difference, the one that is allowed: `share` of the largest value)"""
    return (given - other).abs().max().item(), share * given.abs().max().item()


def probe_batch(model, examples: list[dict]) -> dict:
    """The two shortest rows, on the model's device: enough to see a bug, cheap enough to look often."""
    device = next(model.parameters()).device
    batch = collate(sorted(examples, key=lambda e: len(e["input_ids"]))[:2], 0)
    return {name: batch[name].to(device) for name in ("input_ids", "labels")}


def frozen_hash(model) -> str:
    """sha256 over the bytes of every parameter and buffer that is not trained."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" not in name and not tensor.requires_grad:
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    decoder = getattr(causal_lm(model), "cpu_decoder", None)
    dense = [getattr(module, "dequantized", None) for module in model.modules()]
    for copy in decoder.frozen() if decoder else filter(torch.is_tensor, dense):  # what a CPU multiplies with
        digest.update(_bytes(copy))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor):
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a sharded one, this part
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()


def _gradients(model, batch, autocast) -> dict[str, torch.Tensor]:
    """Gradient of each trained matrix, of B only while B is zero (A's gradient is zero then)."""
    model.train()
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast():
        torch.manual_seed(0)  # the same dropout both times
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    (loss * 1024).backward()  # so that fp16 gradients do not underflow; the scale drops out of the comparison
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {n: gradient.clone() for n, gradient in gradients.items() if gradient.norm() > 0}
    model.zero_grad(set_to_none=True)
    return found
