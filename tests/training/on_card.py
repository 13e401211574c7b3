"""A pretended accelerator: tensors that say that they are on `card:0`, and refuse to meet those of the CPU.

They hold CPU tensors inside (torch's registration of a backend in Python makes the device known). Run as a
program, it trains, judges, scores and generates there with this repository's functions: a tensor that was
made on the wrong device stops it, as a GPU would. test_gpu_rehearsal.py starts it.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# What may take tensors of both: copies, and places to look at (a GPU takes those from the CPU).
MOVES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_local_scalar_dense", "aten::index")


class OnCard(torch.Tensor):
    """A tensor of the card; `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **shape, device="card:0")
        made.inner = inner
        return made

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Card(TorchDispatchMode):
    """Inside, device="card" works, and every operator is checked."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """The CPU's operator on what is inside; RuntimeError where tensors of both devices meet."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnCard)]
    others = [t for t in tensors if not isinstance(t, OnCard) and t.dim() > 0]  # numbers may be the CPU's
    name = function.name().partition(".")[0]
    if ours and others and name not in MOVES:
        raise RuntimeError(f"{name}: tensors on card:0 and on {others[0].device} in one operator")
    on_card, cpu = bool(ours), torch.device("cpu")
    for device in [d for d in (*args, kwargs.get("device")) if isinstance(d, torch.device)]:
        on_card = device.type == "card"
        args = tuple(cpu if arg is device else arg for arg in args)
        kwargs = {name: cpu if value is device else value for name, value in kwargs.items()}
    known = {id(t.inner): t for t in ours}
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, OnCard) else t, (args, kwargs))

    def wrapped(t):
        if not isinstance(t, torch.Tensor):
            return t
        return (
            known.get(id(t)) if id(t) in known else OnCard(t) if on_card else t
        )  # in place: the same tensor

    return tree_map(wrapped, function(*args, **kwargs))


def main() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora import evaluation, fast, generation
    from qlora.batches import collate
    from qlora.logits import IGNORE
    from qlora.training import guards as g
    from qlora.variants import Start

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=300, eos_token_id=2)  # fmt: skip
    lm = LlamaForCausalLM(config)
    model = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")).to(
        "card:0"
    )
    assert all(p.device.type == "card" for p in model.parameters())
    fast.repeat_keys(lm)
    fast.make_fast(model)
    rows = [list(range(5, 5 + n)) for n in (40, 44, 49, 60)]
    examples = [{"input_ids": row, "labels": [IGNORE] * (len(row) - 2) + row[-2:]} for row in rows]
    guards = g.Guards()
    frozen = g.check_start(guards, model, examples, nullcontext, Start())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model.train()
        batch = collate(examples, 0, 16)
        ids, labels = (batch[name].to("card:0") for name in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    g.base_unchanged(guards, frozen, model)
    evaluation.BATCH_TOKENS["card"] = 128
    scores = evaluation.score_labels(model, rows, [[7, 2], [8, 2]], nullcontext)
    assert scores.shape == (4, 2)
    assert evaluation.perplexity(model, examples, nullcontext)["tokens"] == 8
    made = generation.generate(model, rows, 3, pad_token_id=0, eos_token_id=2)
    sampled = generation.Sampling(temperature=1.0, top_p=0.9, top_k=20, seed=1)
    made += generation.generate(model, rows[:1], 3, sampled, pad_token_id=0, eos_token_id=2)
    assert all(1 <= len(reply) <= 3 for reply in made)
    print(f"{len(guards.results)} guards, loss {loss.item():.3f}, {len(made)} replies on {ids.device}")
    try:
        torch.ones(2, device="card") + torch.ones(2)
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    import qlora  # noqa: F401  (sets what torch reads)

    _setup_privateuseone_for_python_backend("card")
    made_inside = torch.library.Library("aten", "IMPL")  # by operators, where no Python sees the call

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnCard(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnCard(torch.empty(size, dtype=dtype, device="cpu"))

    def copy_from(source, target, non_blocking=False):
        inner = [t.inner if isinstance(t, OnCard) else t for t in (source, target)]
        inner[1].copy_(inner[0])
        return target

    made_inside.impl("_copy_from", copy_from, "PrivateUse1")
    made_inside.impl("empty_strided", empty_strided, "PrivateUse1")
    made_inside.impl("empty.memory_format", empty, "PrivateUse1")
    with Card():
        main()
