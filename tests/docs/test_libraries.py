"""docs/libraries.md: its script trains, its tables name the libraries' defaults, its messages are real."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Iterator

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

PAGE = (ROOT / "docs" / "libraries.md").read_text()
SCRIPT, LATER = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_folder) -> Iterator[dict]:
    """The page's script with another model, folder and rate: the names that it leaves behind."""
    out = tmp_path_factory.mktemp("libraries") / "adapter"
    script, count = re.subn(
        r"^MODEL, OUT = .*", f"MODEL, OUT = {str(tiny_folder)!r}, {str(out)!r}", SCRIPT, flags=re.M
    )
    script, more = re.subn(r"^STEPS, RATE = .*", "STEPS, RATE = 15, 5e-3", script, flags=re.M)
    assert (count, more) == (1, 1)
    names: dict = {}
    exec(compile(script, "docs/libraries.md", "exec"), names)
    yield names
    names.clear()  # tests of other files count the memory of all tensors that are there
    gc.collect()


def test_the_script_trains_every_matrix(ran):
    losses = [step["loss"] for step in ran["trainer"].state.log_history if "loss" in step]
    assert len(losses) == 15
    assert losses[-1] < losses[0] - 0.2  # a random model of two layers, from 10.8
    learned = {name: p.abs().max().item() for name, p in ran["model"].named_parameters() if "lora_B" in name}
    assert len(learned) == 14 and min(learned.values()) > 0


def test_its_labels_are_the_answer_and_the_end(ran):
    rows = [
        ran["encode"](text, answer)
        for text, answer in (("Good.", "positive"), ("Not that good.", "negative"))
    ]
    batch = ran["trainer"].data_collator(rows)
    supervised = [labels[labels != -100] for labels in batch["labels"]]
    said = [ran["tokenizer"].decode(ids) for ids in supervised]
    assert said == ["positive<|im_end|>", "negative<|im_end|>"]


def test_the_reloaded_adapter_is_the_trained_one(ran):
    ids = ran["asked"]["input_ids"]
    trained = ran["model"].eval()
    with torch.no_grad():
        ours, theirs = trained(input_ids=ids).logits, ran["reloaded"](input_ids=ids).logits
        with trained.disable_adapter():
            without = trained(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 0.01 * (ours - without).abs().max()


def test_adapters_are_switched_and_merged(ran):
    names, ids = dict(ran), ran["asked"]["input_ids"]
    exec(compile(LATER, "docs/libraries.md", "exec"), names)
    assert set(names["reloaded"].peft_config) == {"default", "second"} and len(names["both"]) == 2
    saved = AutoModelForCausalLM.from_pretrained(f"{names['OUT']}-merged", dtype=torch.float32).eval()
    with torch.no_grad(), names["reloaded"].disable_adapter():
        base = names["reloaded"](input_ids=ids).logits
    with torch.no_grad():
        trained, merged = names["reloaded"](input_ids=ids).logits, saved(input_ids=ids).logits
    assert (merged - trained).norm() < 0.1 * (base - trained).norm()


def rows_of(heading: str) -> list[tuple[str, str]]:
    """(name, default) of the table below a heading: | `r` | `8` | …"""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", part, re.M)


@pytest.mark.parametrize("kind, least", [(BitsAndBytesConfig, 8), (LoraConfig, 11), (TrainingArguments, 19)])
def test_defaults_are_the_libraries(kind, least):
    found, known = rows_of(kind.__name__), inspect.signature(kind).parameters
    assert len(found) >= least
    of_none = {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_storage": torch.uint8}
    for name, shown in found:
        default = of_none.get(name) if known[name].default is None else known[name].default
        assert eval(shown, {"torch": torch}) == default, name


def fresh(tiny_folder, **options):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def test_targets_that_the_page_speaks_of(tiny_folder):
    def targets(wanted) -> set[str]:
        model = fresh(tiny_folder, target_modules=wanted)
        return {
            name.split(".lora_A")[0].split(".")[-1]
            for name, _ in model.named_parameters()
            if "lora_A" in name
        }

    assert targets(None) == {"q_proj", "v_proj"}
    assert targets(["q_proj", "unknown"]) == {"q_proj"}
    assert len(targets("all-linear")) == 7
    for nothing in ("q_proj", "q_proj,v_proj", ["unknown"]):
        with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
            targets(nothing)


def test_an_adapter_loads_frozen(tiny_folder, tmp_path):
    fresh(tiny_folder).save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    for is_trainable in (False, True):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)
        loss = model(input_ids=ids, labels=ids).loss
        assert loss.requires_grad == is_trainable
        if not is_trainable:
            with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
                loss.backward()


def test_a_new_token_needs_a_row(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    new = model.config.vocab_size
    with pytest.raises(IndexError, match="index out of range in self"):
        model(input_ids=torch.tensor([[new]]))
    mean = model.get_input_embeddings().weight.mean(0)
    model.resize_token_embeddings(new + 1)
    assert torch.allclose(model.get_input_embeddings().weight[new], mean, atol=1e-4)
    choice = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[new])
    trained = [name for name, p in get_peft_model(model, choice).named_parameters() if p.requires_grad]
    assert [name for name in trained if "lora_" not in name] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    ]


def test_a_list_of_skipped_modules_replaces_the_default(tiny_folder):
    def head(skipped) -> str:
        four_bit = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
        return type(
            AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=four_bit).lm_head
        ).__name__

    assert [head(None), head(["q_proj"]), head(["q_proj", "lm_head"])] == ["Linear", "Linear4bit", "Linear"]


def test_a_collator_that_masks_by_id_loses_the_end(tokenizer):
    assert tokenizer.pad_token == tokenizer.eos_token
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer("fine" + tokenizer.eos_token)])
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id
    assert batch["labels"][0, -1] == -100
