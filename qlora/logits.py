"""Logits only where they are needed.

A causal language model's own forward makes batch x tokens x vocabulary of them. With a 49k vocabulary and
8 x 256 tokens that is 0.4 GB in fp32, three times in the backward pass, for two or three labels a row.
"""

import types

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from config import CHUNK_POSITIONS
from qlora.cpu.attach import usable
from qlora.cpu.head import HeadLoss

IGNORE = -100  # label of a position that is not trained on (torch's cross_entropy ignores it)


def causal_lm(model):
    """The transformers model inside a PEFT model (adapters live in its layers), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model, input_ids, **kwargs):
    """Output of the decoder before the head: last_hidden_state (batch, tokens, hidden), past_key_values.

    Rows are padded on the right, where a real token never looks: no attention mask, so the faster kernel.
    Where position_ids begin again inside a row, transformers makes a mask that keeps examples apart.
    """
    lm = causal_lm(model)
    return getattr(lm, lm.base_model_prefix)(input_ids=input_ids, **kwargs)


def logits_from(lm, hidden) -> torch.Tensor:
    """Logits in fp32 of hidden states, as the model's own forward makes them: the head, and Gemma 2's cap."""
    head = lm.get_output_embeddings()
    logits = head(hidden.to(head.weight.dtype))  # on a CPU they come in fp32
    if cap := getattr(lm.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits.float()


def states_at(model, input_ids, wanted, **kwargs) -> torch.Tensor:
    """Hidden states (positions, width) where the mask `wanted` (batch, tokens) is true, row by row."""
    if decoder := usable(causal_lm(model)):
        return decoder(input_ids, wanted, kwargs.get("position_ids"))
    # Selecting copies the few rows that matter; a slice's strides would make the head a batched product.
    return hidden_states(model, input_ids, use_cache=False, **kwargs).last_hidden_state[wanted]


@torch.no_grad()
def last_logits(model, input_ids, autocast) -> torch.Tensor:
    """Logits (batch, vocabulary) in fp32 after each row's last position, in evaluation mode."""
    model.eval()
    last = torch.zeros_like(input_ids, dtype=torch.bool)
    last[:, -1] = True
    with autocast():
        return logits_from(causal_lm(model), states_at(model, input_ids, last))


def labelled_states(lm, input_ids, labels, **kwargs):
    """(hidden states of the labelled positions, their targets, each the position's next token)"""
    targets = labels[:, 1:]
    labelled = targets != IGNORE
    return states_at(lm, input_ids, F.pad(labelled, (0, 1)), **kwargs), targets[labelled]


def loss_at_labels(lm, labelled=labelled_states) -> None:
    """Give `lm` a forward that, when labels come, makes logits at the labelled positions only.

    The loss is the model's own: mean cross-entropy over labelled positions, or their sum divided by
    `num_items_in_batch` when the Trainer gives it (so that gradient accumulation weighs every token alike).
    It is put on the model, not into a Trainer subclass, so that DDP and FSDP still see one forward call.
    transformers' own logits_to_keep takes the same positions for every row and keeps all of an `lm` row's
    logits. `labelled` is another function where shapes have to be known before there are labels
    (memory/step.py).
    """
    original = lm.forward

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return original(input_ids=input_ids, **kwargs)
        kwargs.pop("use_cache", None)
        picked, targets = labelled(self, input_ids, labels, **kwargs)
        total = token_losses(self, picked, targets).sum()
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    lm.forward = types.MethodType(forward, lm)


def log_p_of_rows(lm, input_ids, labels, **kwargs) -> torch.Tensor:
    """log P of each row's labelled tokens together (batch,), 0 where there are none; with its gradient."""
    labelled = labels[:, 1:] != IGNORE
    hidden, targets = labelled_states(lm, input_ids, labels, **kwargs)
    losses = token_losses(lm, hidden, targets)
    return -losses.new_zeros(labelled.shape).masked_scatter(labelled, losses).sum(1)


def token_losses(lm, hidden, targets) -> torch.Tensor:
    """-log P (positions,) in fp32 of targets (positions,) by hidden states (positions, width)."""
    head = lm.get_output_embeddings()
    plain = head.bias is None and not getattr(lm.config, "final_logit_softcapping", None)
    if plain and usable(lm) and hidden.requires_grad and not head.weight.requires_grad:
        return HeadLoss.apply(hidden, targets, head.weight)
    chunks = zip(hidden.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS))
    return torch.cat([_chunk_losses(lm, h, t) for h, t in chunks])


def _chunk_losses(lm, hidden, targets):
    def loss(hidden, targets):
        return F.cross_entropy(logits_from(lm, hidden), targets, reduction="none")

    # Full chunks (objective lm) are recomputed in the backward pass instead of kept.
    if hidden.shape[0] == CHUNK_POSITIONS and torch.is_grad_enabled():
        return checkpoint(loss, hidden, targets, use_reentrant=False)
    return loss(hidden, targets)
