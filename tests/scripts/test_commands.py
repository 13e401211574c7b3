"""Commands as users of TRL, Axolotl, LLaMA-Factory, Unsloth, mlx-lm and of courses type them: each sets what
it means, or one line says how it is done here."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

import pytest
from conftest import ROOT, SMALL_RUN, here

import config
from qlora import aliases
from qlora.cli import UsageError, parse
from qlora.settings_file import read_settings

TRAIN, INFER, DEMO = config.TrainSettings, config.InferSettings, config.DemoSettings

# (who types it, settings class, words after the program's name, what has to be set)
UNDERSTOOD = [
    (
        "course",
        TRAIN,
        "--samples 1000 --epochs 3 --lora_rank 16",
        {"samples": 1000, "epochs": 3, "lora_r": 16},
    ),
    ("course", TRAIN, "--samples 1000 --epochs 3 --qlora_bits 4", {"samples": 1000, "precision": "nf4"}),
    ("course", TRAIN, "--qlora_bits 8", {"precision": "int8"}),
    ("course", TRAIN, "--qlora-bits=16", {"precision": "bf16"}),
    ("course", TRAIN, "--test", {"test": True}),
    (
        "TRL",
        TRAIN,
        "--model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara --learning_rate 2.0e-4"
        " --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8"
        " --gradient_checkpointing True --logging_steps 25 --use_peft --lora_r 32 --lora_alpha 16",
        {"model": "Qwen/Qwen2.5-0.5B", "dataset": ("trl-lib/Capybara",), "learning_rate": 2e-4, "epochs": 1}
        | {"batch_size": 2, "grad_accum": 8, "gradient_checkpointing": True, "lora_r": 32, "lora_alpha": 16},
    ),
    (
        "TRL",
        TRAIN,
        "--load_in_4bit --lora_target_modules q_proj v_proj --bf16 True --max_seq_length 1024",
        {"precision": "nf4", "target_modules": "q_proj,v_proj", "max_length": 1024},
    ),
    (
        "TRL",
        TRAIN,
        "--load_in_8bit --use_bnb_nested_quant --bnb_4bit_compute_dtype bfloat16 --no-gradient_checkpointing",
        {"precision": "int8", "gradient_checkpointing": False},
    ),
    (
        "Trainer",
        TRAIN,
        "--model_name_or_path m --train_file my.csv --do_train --do_eval --overwrite_output_dir --seed 1"
        " --save_strategy steps --per_device_eval_batch_size 8 --lr_scheduler_type linear"
        " --weight_decay 0.0 --optim adamw_torch",
        {"model": "m", "dataset": ("my.csv",), "overwrite": True, "seed": 1},
    ),
    (
        "Unsloth",
        TRAIN,
        "--model_name m --max_seq_length 2048 --load_in_4bit --r 64 --lora_alpha 32 --lora_dropout 0.1"
        " --bias none --use_gradient_checkpointing unsloth --random_state 3407 --use_rslora"
        " --max_steps 400 --lr 2e-6",
        {
            "max_length": 2048,
            "precision": "nf4",
            "lora_r": 64,
            "lora_dropout": 0.1,
            "gradient_checkpointing": True,
        }
        | {"seed": 3407, "lora_variant": "rslora", "max_steps": 400, "learning_rate": 2e-6},
    ),
    (
        "LLaMA-Factory",
        TRAIN,
        "--stage sft --do_train True --model_name_or_path m --dataset d --finetuning_type lora"
        " --cutoff_len 1024 --quantization_bit 4 --lora_rank 8 --max_samples 500 --output_dir saves",
        {"max_length": 1024, "precision": "nf4", "lora_r": 8, "samples": 500},
    ),
    ("LLaMA-Factory", TRAIN, "--stage pt --lora_target q_proj,v_proj", {"objective": "lm"}),
    (
        "mlx-lm",
        TRAIN,
        "--model m --train --data rows.jsonl --iters 600 --batch-size 4 --fine-tune-type lora",
        {"dataset": ("rows.jsonl",), "max_steps": 600, "batch_size": 4},
    ),
    ("mlx-lm", INFER, "--max-tokens 100 --temperature 0.7 Hello", {"max_new_tokens": 100, "prompt": "Hello"}),
    ("TRL", INFER, "--model_name_or_path m --load_in_4bit Hello", {"model": "m", "precision": "nf4"}),
    ("TRL", DEMO, "--plan --model_name_or_path m --max_seq_len 4096 --lora_rank 8", {"max_length": 4096}),
]

# (who types it, settings class, words, what the one line says)
TOLD = [
    (
        "course",
        INFER,
        "--model_path models/lora.pt --model_type lora",
        "--adapter FOLDER; a server: llama.cpp/serve.sh",
    ),
    ("course", TRAIN, "--qlora_bits 3", "here it is 4 or 8 or 16"),
    ("TRL", TRAIN, "--attn_implementation flash_attention_2", "attention is PyTorch's own"),
    ("TRL", TRAIN, "--lr_scheduler_type cosine --warmup_ratio 0.1", "falls linearly .*; --warmup_ratio: "),
    ("Trainer", TRAIN, "--optim paged_adamw_32bit --deepspeed ds.json", "AdamW.*; --deepspeed: .*torchrun"),
    ("Trainer", TRAIN, "--resume_from_checkpoint out/checkpoint-100", "--resume goes on from the newest"),
    ("Unsloth", TRAIN, "--save_method merged_16bit --quantization_method q4_k_m", "export.py --types"),
    ("Axolotl", TRAIN, "--load_in_4bit --load_in_8bit", "another flag says --precision nf4"),
]


def named(case) -> str:
    return f"{case[0]} {case[2]}"[:60]


@pytest.mark.parametrize("case", UNDERSTOOD, ids=named)
def test_it_sets_what_it_means(case):
    _, kind, words, expected = case
    s = parse(kind, shlex.split(words), None)
    assert {name: getattr(s, name) for name in expected} == expected


@pytest.mark.parametrize("case", TOLD, ids=named)
def test_or_one_line_says_how(case):
    _, kind, words, line = case
    with pytest.raises(UsageError, match=line) as caught:
        parse(kind, shlex.split(words), None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_there_are_24_commands():
    assert len(UNDERSTOOD + TOLD) == 24


AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj]
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: linear
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
logging_steps: 1
special_tokens:
  pad_token: <|end_of_text|>
"""
NESTED = re.compile(
    r"^(datasets|special_tokens):\n(  .*\n)+|^(val_set_size|optimizer|wandb\w*|lora_model\w*): ?.*\n", re.M
)


def test_an_axolotl_file_is_told_apart_in_one_line(tmp_path):
    """Its flat keys are understood; the line says what to write for the others."""
    path = tmp_path / "axolotl.yml"
    path.write_text(AXOLOTL)
    with pytest.raises(UsageError) as caught:
        parse(TRAIN, ["--config", str(path)], None)
    line = str(caught.value)
    assert (
        "line 6: datasets: one flat setting, dataset:" in line
        and "line 9: val_set_size: --eval-samples" in line
    )
    assert "optimizer: always torch's AdamW" in line and "special_tokens: the model's own" in line
    assert "base_model is model" in line and "micro_batch_size is batch_size" in line and "\n" not in line
    path.write_text(NESTED.sub("", AXOLOTL) + "dataset: rows.jsonl\n")  # what the line says to do
    s = parse(TRAIN, ["--config", str(path)], None)
    assert (s.model, s.precision, s.max_length, s.epochs) == ("NousResearch/Llama-3.2-1B", "nf4", 2048, 1)
    assert (s.target_modules, s.batch_size, s.learning_rate) == ("gate_proj,down_proj", 2, 2e-4)


def test_accelerates_file_is_told_apart():
    with pytest.raises(UsageError, match="accelerate launch"):
        read_settings(ROOT / "configs" / "fsdp_qlora.yaml", TRAIN)


FLAGS = {field.name for kind in (TRAIN, INFER, DEMO) for field in dataclasses.fields(kind)}


def test_what_the_tables_name_is_there():
    for name, meant in aliases.ALIASES.items():
        ours = [meant] if isinstance(meant, str) else [found[0] for found in meant.values() if found]
        assert set(ours) <= FLAGS, f"{name}: {ours}"
    for name, line in aliases.ELSEWHERE.items():
        for flag in re.findall(r"--([a-z][a-z-]+)", line):
            assert flag.replace("-", "_") in FLAGS | {"types"}, f"{name}: --{flag}"
        for path in re.findall(r"\S+\.(?:py|sh|md)\b", line):
            assert (ROOT / path.strip("()")).exists(), f"{name}: {path}"


def test_a_setting_of_ours_is_never_taken_for_another():
    """`adapter` is Axolotl's word for QLoRA, and our flag for a folder."""
    assert parse(INFER, ["--adapter", "qlora", "Hello"], None).adapter == ("qlora",)
    assert parse(INFER, ["--plain", "True"], None).prompt == "True"  # a switch, and something to answer


def test_test_scores_the_rows_that_were_held_out_and_changes_nothing(trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    done = here("qlora_finetune.py", "--test", "--output-dir", trained, "--lane", "fp32")
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((trained / "report.json").read_text())["evaluation"]["tuned"]["accuracy"]
    assert (
        done.stdout.split()[:2] == [trained.name, f"{100 * accuracy:.1f}%"]
        and "8 held-out rows" in done.stderr
    )
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_test_of_a_run_on_texts_is_its_perplexity(tiny_folder, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text(
        "".join(json.dumps({"text": f"Page {i} of a book about the sea."}) + "\n" for i in range(30))
    )
    flags = ("--model", tiny_folder, "--objective", "lm", "--dataset", rows, *SMALL_RUN, "--max_steps", 2)
    done = here("qlora_finetune.py", *flags, "--output_dir", out)
    assert done.returncode == 0, done.stderr
    done = here("qlora_finetune.py", "--test", "--output-dir", out, "--lane", "fp32")
    after = json.loads((out / "report.json").read_text())["evaluation"]["perplexity"]["after"]["perplexity"]
    assert done.returncode == 0 and f"perplexity {after:.3f} " in done.stdout, done.stderr
    done = here(
        "qlora_inference.py", "--adapter", out, "--evaluate", "--dataset", chat(tmp_path), "--lane", "fp32"
    )
    assert done.returncode == 2 and "was trained on texts" in done.stderr


def chat(folder):
    path = folder / "chat.jsonl"
    path.write_text(
        '{"prompt": "Hi.", "completion": "Hello."}\n{"prompt": "Bye.", "completion": "See you."}\n'
    )
    return path


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_test_trains_nothing(flag, tmp_path):
    done = here("qlora_finetune.py", "--test", flag, "--output-dir", tmp_path)
    assert done.returncode == 2 and "--test writes nothing" in done.stderr


def test_test_without_a_run(tmp_path):
    done = here("qlora_finetune.py", "--test", "--output-dir", tmp_path / "none")
    assert done.returncode == 2 and "--test: no folder" in done.stderr
