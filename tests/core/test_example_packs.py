"""Several examples in one row: they learn what they learn alone, and none sees its neighbour."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora import fast
from qlora.batches import BLANK, LengthBatches, collate
from qlora.cli import UsageError
from qlora.cpu.tokens import flatten, like_lengths
from qlora.example_packs import fill, joined, logits_of_last, pack, refuse_leaks
from qlora.hardware import detect
from qlora.logits import IGNORE, loss_at_labels

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
KINDS = {
    "LlamaConfig": {},
    "Qwen3Config": {"head_dim": 16},
    "Gemma2Config": WINDOW,
    "Gemma3TextConfig": WINDOW,
    "MistralConfig": {"sliding_window": 8},
    "SmolLM3Config": {"no_rope_layers": [1, 0]},
}
LENGTHS = (90, 5, 41, 33, 12, 70)  # in bands of their own, and one that takes two blocks of queries


def adapted(kind="LlamaConfig", **options):
    """A random model with an adapter whose B is not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **options))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.15
    loss_at_labels(model.get_base_model())
    return model.eval()


def texts(lengths=LENGTHS, seed=3) -> list[dict]:
    """Every token is a label, but for a few at the beginning of the second."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 100, (length,), generator=generator).tolist() for length in lengths]
    labels = [list(row) for row in ids]
    labels[1][:3] = [IGNORE] * 3
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels)]


def loss_and_gradients(model, batch: dict) -> tuple[float, dict]:
    batch.pop("real_tokens")
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_each_row_stands_in_one_pack_and_none_is_too_long():
    assert sorted(map(sorted, fill([5, 3, 4, 2], 8, seed=1))) == [[0, 1], [2, 3]]
    lengths = torch.randint(1, 65, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = fill(lengths, 64, seed=1)
    assert sorted(i for each in packs for i in each) == list(range(500))
    assert all(sum(lengths[i] for i in each) <= 64 for each in packs)
    assert sum(lengths) > 0.95 * 64 * len(packs), "nearly full"
    assert packs == fill(lengths, 64, seed=1) != fill(lengths, 64, seed=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_has_each_row_once_and_another_order(processes):
    packs = pack(texts(list(range(5, 65)), seed=1), 64, seed=1)
    sampler = LengthBatches([len(p["input_ids"]) for p in packs], 4, 1, processes)
    rows = [*packs, BLANK]
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(order := list(sampler))
        assert len(order) % (4 * processes) == 0 or processes == 1
        read = [rows[i]["input_ids"] for i in order if rows[i] is not BLANK]
        assert sorted(read) == sorted(p["input_ids"] for p in packs)
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_pack_by_hand():
    one, two = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}
    both = joined([one, two])
    assert both["labels"] == [IGNORE, 6, 7, IGNORE, 9], "8 is not what follows 7"
    batch = collate([both, BLANK, joined([two])], 0, multiple=8)
    # padding goes on where a row's last example ended
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [*range(8)], [*range(8)]]
    assert batch["real_tokens"] == 7 and "position_ids" not in collate([one, two], 0)


def test_packed_rows_are_taken_apart_and_put_together_by_length():
    assert like_lengths([9, 2, 8, 3]) == [[0, 2], [3], [1]]
    ids, wanted = torch.tensor([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0]]), torch.zeros(2, 6, dtype=torch.bool)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]])
    wanted[0, [0, 3, 4]] = wanted[1, [0, 3]] = True
    rows = flatten(ids, wanted, positions)
    # 1 2 3 4 and 7 8 9 are alike, 5 and 6 are as well; what is wanted keeps its order
    assert rows.ids[:9].tolist() == [1, 2, 3, 4, 7, 8, 9, 5, 6] and rows.ids[rows.wanted].tolist() == [
        1,
        4,
        5,
        6,
        9,
    ]
    assert [band.place.tolist() for band in rows.bands] == [[[0, 1, 2, 3], [4, 5, 6, -1]], [[0], [1]]]


@pytest.mark.parametrize("lane", ["fp32", "libraries"])
def test_loss_and_gradients_are_those_of_rows_alone(lane):
    model, examples = adapted(), texts()
    words = fast.make_fast(model, lane)
    assert words.startswith("fp32 products, own decoder" if lane == "fp32" else "the libraries' own")
    loss, exact = loss_and_gradients(model, collate(examples, 0, 16))
    packs = pack(examples, 100, seed=1)
    assert [p["position_ids"].count(0) for p in packs] == [2, 1, 3]
    for _ in range(2):  # the second time in buffers of the first
        mine, found = loss_and_gradients(model, collate(packs, 0, 16))
        assert mine == pytest.approx(loss, rel=1e-5) and found.keys() == exact.keys()
        assert max((found[n] - exact[n]).norm() / exact[n].norm() for n in exact) < 3e-5
    # one that is not taken apart is another loss
    whole = [{name: p[name] for name in ("input_ids", "labels")} for p in packs]
    assert loss_and_gradients(model, collate(whole, 0, 16))[0] != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("lane", ["fp32", "libraries"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_is_not_seen(kind, lane):
    model, autocast = adapted(kind, **KINDS[kind]), detect(lane="fp32").autocast
    fast.make_fast(model, lane)
    first, other = texts((30, 30))
    last = texts((20, 9), seed=4)[0]
    ask = lambda neighbour: logits_of_last(model, [neighbour, last], autocast)
    assert torch.equal(ask(first), ask(other)), "not one bit"
    refuse_leaks(model, [first, last], autocast)


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "num_local_experts": 0}
MAMBA |= {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
        ("GraniteMoeHybridConfig", MAMBA),
        ("OPTConfig", {}),
    ],
)
def test_a_model_that_goes_on_from_example_to_example_is_refused(kind, options):
    model = adapted(kind, **options)
    with pytest.raises(UsageError, match="--packing: in .*ForCausalLM an example sees its neighbour"):
        refuse_leaks(model, texts((30, 20)), detect(lane="fp32").autocast)
