"""Preferences: of two replies to a prompt the chosen one is made likelier, by DPO (arXiv 2305.18290).

A pair is two rows of a batch, the chosen reply and the rejected one. The reference is the model as training
begins: a fresh adapter adds nothing, so it is the base; --init-adapter's is the adapter that it went on from.
Its log-probabilities are computed once, before the first step.
"""

import math
import types

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora import processes
from qlora.batches import collate, in_pairs
from qlora.evaluation import log_p_of_labels
from qlora.logits import IGNORE, causal_lm, log_p_of_rows
from qlora.pair_scores import log_p_of, margins, won
from qlora.training.before_after import BeforeAfter
from qlora.training.run_folder import Run


def use_dpo(model, beta: float) -> None:
    """Give `model` DPO's loss where a `reference` comes with the labels: mean over the pairs that have any.

    Or their sum divided by `num_items_in_batch`, the pairs of the whole update. Without a reference the loss
    stays what it was. On the model, so that DDP and FSDP see one forward call, see logits.loss_at_labels().
    """
    lm = causal_lm(model)
    plain = lm.forward

    def forward(self, input_ids=None, labels=None, reference=None, num_items_in_batch=None, **kwargs):
        if reference is None:
            kwargs |= {} if labels is None else {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return plain(input_ids=input_ids, **kwargs)
        kwargs.pop("use_cache", None)
        log_p = log_p_of_rows(self, input_ids, labels, **kwargs)
        losses = -F.logsigmoid(beta * margins(log_p, reference))
        real = real_pairs(labels)  # what fills up the last batch of several processes has no labels
        count = real.sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=(losses * real).sum() / count)

    lm.forward = types.MethodType(forward, lm)


def real_pairs(labels: torch.Tensor) -> torch.Tensor:
    """Which pairs of a batch (2 * pairs, tokens) have labels -> (pairs,)"""
    return (labels[::2] != IGNORE).any(1)


def pairs_differ(guards, halves: list[dict]) -> None:
    """Both halves of a pair have one prompt, and replies that differ: else there is nothing to prefer."""
    pairs = [(chosen, rejected, chosen["asked"]) for chosen, rejected in zip(halves[::2], halves[1::2])]
    same = sum(c["input_ids"][:n] == r["input_ids"][:n] and n == r["asked"] for c, r, n in pairs)
    unlike = [(c["labels"][n:], r["labels"][n:]) for c, r, n in pairs]
    differ, at_once = sum(c != r for c, r in unlike), sum(c[:1] != r[:1] for c, r in unlike)
    count = f"of {len(pairs)} pairs"
    detail = (
        f"{same} {count} have one prompt, {differ} replies that differ, {at_once} from the first token on"
    )
    guards.check("pairs_differ", same == differ == len(pairs), detail)


@torch.no_grad()
def starts_at_log_2(guards, model, halves: list[dict], autocast) -> None:
    """Before the first step the model is its own reference, so every margin is zero and the loss is log 2."""
    device, lm = next(model.parameters()).device, causal_lm(model)
    batch = collate(sorted(in_pairs(halves), key=lambda pair: len(pair["input_ids"]))[:2], 0)
    ids, labels, reference = (batch[name].to(device) for name in ("input_ids", "labels", "reference"))
    model.eval()
    with autocast():
        loss = model(input_ids=ids, labels=labels, reference=reference).loss.item()
        log_p = log_p_of_rows(lm, ids, labels)
    gap = ((log_p - reference).abs() / reference.abs().clamp_min(1.0)).max().item()
    limit = max(1e-3, 8 * torch.finfo(lm.dtype).eps)
    told = f"DPO's loss at step 0 is {loss:.5f} (log 2 is {math.log(2):.5f})"
    detail = f"{told}; log-probabilities are off the reference's by {gap:.2g} (allowed {limit:.2g})"
    guards.check("starts_at_log_2", gap <= limit, detail)


class PairScores(BeforeAfter):
    """Held-out pairs before and after, and the reference of the training pairs (halves, as encoded)."""

    def __init__(self, base, prompt, held_out: list, train: list[dict], beta: float):
        super().__init__(base, prompt, held_out)
        self.train, self.beta = train, beta

    def score_before(self, run: Run, model, train_rows: list, start) -> dict:
        before = super().score_before(run, model, train_rows, start)
        self.started = before["pairs"]
        for half, log_p in zip(self.train, before["reference"]):
            half["reference"] = log_p
        return before

    @property
    def scored(self) -> int:
        return len(self.examples) // 2

    def scorer(self, rows: int):
        """Of the first `rows` pairs while the run trains: DPO's loss, and how many are won."""
        halves, started = self.examples[: 2 * rows], self.started[: 2 * rows]

        def score(model) -> dict:
            mine = lambda share: log_p_of_labels(model, share, self.base.hardware.autocast)
            found = compare(started, processes.shared_out(halves, mine), self.beta)
            return {"loss": found["loss"], "accuracy": found["after"]["accuracy"]}

        return score

    def parts(self, model, train_rows: list) -> dict:
        of = {"pairs": (self.examples, "held-out pairs"), "reference": (self.train, "reference")}
        return {n: lambda n=n, each=each: {n: log_p_of(self.base, model, *each)} for n, each in of.items()}

    def score_after(self, model, before: dict, chosen_on: int = 0) -> dict:
        """The report's `evaluation`; see compare(). Pairs that chose the step are among them."""
        now = log_p_of(self.base, model, self.examples, "tuned, held-out pairs")
        prompts = {tuple(e["input_ids"][: e["asked"]]) for e in self.examples}
        found = compare(before["pairs"], now, self.beta)
        found["shorter_chosen"] = shorter_chosen(self.examples)
        return {"rows": len(now) // 2, "prompts": len(prompts), "pairs": found}


def compare(before: list[float], after: list[float], beta: float) -> dict:
    """Of log-probabilities, chosen and rejected in turn, `before` those of the reference.

    before, after: share of pairs with log P(chosen) > log P(rejected). reward: with an implicit reward, beta
    times log P / P_reference, that is higher for the chosen reply (what TRL logs as rewards/accuracies).
    """
    then, now = torch.tensor(before), torch.tensor(after)
    nothing = torch.zeros_like(now)
    rewards = beta * margins(now, then)
    return {
        "before": won(margins(then, nothing)),
        "after": won(margins(now, nothing)),
        "reward": won(rewards),
        "loss": -F.logsigmoid(rewards).mean().item(),
        "beta": beta,
    }


def shorter_chosen(halves: list[dict]) -> float:
    """Share of pairs whose chosen reply has fewer tokens: a sum of log-probabilities favours short ones."""
    lengths = [len(e["input_ids"]) - e["asked"] for e in halves]
    return sum(c < r for c, r in zip(lengths[::2], lengths[1::2])) / (len(lengths) // 2)
