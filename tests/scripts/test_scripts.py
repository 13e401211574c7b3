"""The three scripts, run as a user runs them."""

import json

import pandas as pd
import pytest
import torch
from conftest import SMALL_RUN, here, script

SCRIPTS = ("quant_llama32_4bit_lora.py", "qlora_finetune.py", "qlora_inference.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_imports_nothing_heavy(name):
    code = (
        f"import sys, runpy; sys.argv = ['{name}', '--help']\n"
        f"try: runpy.run_path('{name}', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    import subprocess
    import sys

    from conftest import ROOT

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False" and "--model" in done.stdout


def test_run_leaves_what_the_readme_names(trained):
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "qlora.json",
        "tokenizer.json",
        "report.json",
        "report.md",
        "curves.png",
        "README.md",
    ):
        assert (trained / name).stat().st_size > 0
    assert (trained / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # safetensors writes files that nobody else may read
    assert (trained / "adapter_model.safetensors").stat().st_mode == (trained / "report.json").stat().st_mode


def test_report_has_the_contracts_keys(trained):
    report = json.loads((trained / "report.json").read_text())
    assert set(report) >= {
        "environment",
        "settings",
        "data",
        "lora",
        "memory",
        "train",
        "evaluation",
        "guards",
    }
    assert set(report["data"]) >= {
        "train_rows",
        "eval_rows",
        "train_tokens",
        "supervised_tokens",
        "duplicates_removed",
    }
    assert set(report["train"]) >= {"steps", "seconds", "tokens_per_second", "loss_first", "loss_last"}
    evaluation = report["evaluation"]
    assert evaluation["rows"] == 8 and set(evaluation["flips"]) >= {"fixed", "broken"}
    for who in ("base_zero_shot", "base_few_shot", "bag_of_words", "tuned"):
        assert 0 <= evaluation[who]["low"] <= evaluation[who]["accuracy"] <= evaluation[who]["high"] <= 1
    assert report["train"]["steps"] == 4 and report["train"]["real_tokens"] == report["data"]["train_tokens"]
    # answer and end token of each row
    assert report["data"]["supervised_tokens"] == 2 * report["data"]["train_rows"]
    names = [g["name"] for g in report["guards"]]
    assert all(g["passed"] for g in report["guards"])
    assert set(names) == {
        "labels_present",
        "updates_applied",
        "end_supervised",
        "starts_as_base",
        "loss_is_models_own",
        "nothing_repacked",
        "all_matrices_learn",
        "finite",
        "base_unchanged",
        "reloads_same",
    }


def test_trainable_parameters_by_hand(trained):
    # rank 16 on q (64x64), k and v (32x64), o (64x64), gate and up (128x64), down (64x128), two layers
    per_layer = 16 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 128) + (128 + 64))
    assert json.loads((trained / "report.json").read_text())["lora"]["trainable_parameters"] == 2 * per_layer


def test_adapter_loads_in_plain_peft_with_the_same_logits(trained, tiny_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from qlora.adapters import load_trained, read_adapter
    from qlora.hardware import detect

    ids = AutoTokenizer.from_pretrained(trained)("A film like this", return_tensors="pt").input_ids
    ours, base = load_trained(read_adapter(trained))
    hardware = base.hardware
    dtype = detect().dtype
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=quantized, dtype=dtype)
    plain = PeftModel.from_pretrained(base, trained).eval()
    with torch.no_grad(), hardware.autocast():
        a, b = ours(input_ids=ids).logits.float(), plain(input_ids=ids).logits.float()
        with plain.disable_adapter():
            without = plain(input_ids=ids).logits.float()
    assert (a - b).norm() < 0.01 * b.norm()
    assert (a - b).norm() < 0.2 * (without - b).norm()  # far closer than the model without the adapter


def test_inference_one_prompt_answers_on_stdout_only(trained):
    done = script(SCRIPTS[2], "--adapter", trained, "--max-new-tokens", "3", "A fine film.")
    assert done.returncode == 0, done.stderr
    assert done.stdout and "adapter" in done.stderr and "adapter    " not in done.stdout


def test_inference_lines_from_stdin_and_file_agree(trained, tmp_path):
    lines = ["A fine film.", "", "Awful.", "Long and dull, but the music is nice."]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    flags = ("--adapter", trained, "--max-new-tokens", "3", "--batch-size", "2")
    piped = here(SCRIPTS[2], *flags, stdin="\n".join(lines))
    filed = here(SCRIPTS[2], *flags, "--prompts", tmp_path / "prompts.txt")
    assert piped.returncode == filed.returncode == 0, piped.stderr + filed.stderr
    assert piped.stdout == filed.stdout and len(piped.stdout.splitlines()) == 3


def test_sampling_is_repeatable_by_seed(trained):
    flags = (
        "--adapter",
        trained,
        "--max-new-tokens",
        "8",
        "--temperature",
        "1.5",
        "--top-k",
        "500",
        "Tell me.",
        "--plain",
    )
    first, again, other = (here(SCRIPTS[2], *flags, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_compare_and_base_alone(trained, tiny_folder):
    compared = here(SCRIPTS[2], "--adapter", trained, "--compare", "--max-new-tokens", "3", "A fine film.")
    assert compared.returncode == 0 and "  base" in compared.stdout and f"  {trained.name}" in compared.stdout
    assert all(f"\n{name}  " in f"\n{compared.stderr}" for name in ("device   ", "dtype    ", "versions "))
    alone = here(SCRIPTS[2], "--adapter", "none", "--model", tiny_folder, "--max-new-tokens", "3", "Hello")
    assert alone.returncode == 0 and alone.stdout, alone.stderr


def test_base_alone_needs_no_model_flag():
    # once a NameError: the default model was asked for before the hardware was known
    done = here(SCRIPTS[2], "--adapter", "none", "--max-new-tokens", "2", "Hello")
    assert done.returncode == 0 and done.stdout.strip() and "base       " in done.stderr, done.stderr


def test_evaluate_repeats_the_training_runs_score(trained):
    done = here(
        SCRIPTS[2], "--adapter", trained, "--evaluate", "--compare"
    )  # as many rows as training held out
    report = json.loads((trained / "report.json").read_text())["evaluation"]
    assert done.returncode == 0, done.stderr
    base, tuned = done.stdout.splitlines()
    assert (
        f"{100 * report['base_zero_shot']['accuracy']:.1f}%" in base
        and f"{100 * report['tuned']['accuracy']:.1f}%" in tuned
    )


def test_evaluate_refuses_to_score_training_rows(trained):
    done = here(SCRIPTS[2], "--adapter", trained, "--evaluate", "--eval-samples", "9")
    assert done.returncode == 2 and "the next ones were trained on" in done.stderr


def test_merged_model_is_plain_and_keeps_its_answers(trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.adapters import load_trained, read_adapter

    done = here(SCRIPTS[2], "--adapter", trained, "--merge", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    drift = {
        line.split("into ")[1].split()[0]: float(line.split("logits ")[1].split("%")[0])
        for line in done.stderr.splitlines()
        if line.startswith("merge")
    }
    assert drift["dequantized"] < 1 < drift["original"]
    other = here(SCRIPTS[2], "--adapter", trained, "--merge", tmp_path / "other", "--merge-base", "original")
    assert (
        other.returncode == 0
        and f"original weights: logits {drift['original']:.2f}%" in other.stderr
        and "this one is written" in other.stderr
    )
    written = (tmp_path / "merged" / "model.safetensors", tmp_path / "other" / "model.safetensors")
    assert (
        written[0].read_bytes() != written[1].read_bytes()
        and written[0].stat().st_mode == (tmp_path / "merged" / "config.json").stat().st_mode
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype in (torch.bfloat16, torch.float16) and not hasattr(
        merged.config, "quantization_config"
    )
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        "A film like this", return_tensors="pt"
    ).input_ids
    ours, base = load_trained(read_adapter(trained))
    with torch.no_grad(), base.hardware.autocast():
        a, b = ours(input_ids=ids).logits.float(), merged(input_ids=ids).logits.float()
    assert (a - b).norm() < 0.02 * a.norm()


def test_several_adapters_and_the_second_is_another(trained, tiny_folder, tmp_path):
    other = tmp_path / "other"
    assert (
        here(
            SCRIPTS[1],
            "--model",
            tiny_folder,
            "--output-dir",
            other,
            *SMALL_RUN,
            "--lora-r",
            "4",
            "--lora-variant",
            "rslora",
            "--target-modules",
            "q_proj,v_proj",
            "--learning-rate",
            "0.05",
        ).returncode
        == 0
    )
    done = here(SCRIPTS[2], "--adapter", trained, "--adapter", other, "--evaluate", "--eval-samples", "8")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == [
        trained.name,
        "other",
    ], done.stderr
    # Side by side they are what each of them says alone.
    flags = ("--max-new-tokens", "4", "A fine film.")
    alone = {
        folder.name: here(SCRIPTS[2], "--adapter", folder, *flags).stdout.split()
        for folder in (trained, other)
    }
    assert alone[trained.name] != alone["other"]  # else it would not show which of them spoke
    both = here(SCRIPTS[2], "--adapter", trained, "--adapter", other, "--compare", *flags)
    said = {line.split()[0]: line.split()[1:] for line in both.stdout.splitlines() if line.startswith("  ")}
    assert set(said) == {"base", trained.name, "other"} and {name: said[name] for name in alone} == alone, (
        both.stderr
    )


def test_chat_on_a_terminal(trained):
    import os
    import pty
    import subprocess
    import sys

    from conftest import ROOT

    master, slave = pty.openpty()
    command = [sys.executable, "qlora_inference.py", "--adapter", str(trained), "--max-new-tokens", "3"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(slave)
    os.write(master, b"A fine film.\n/use nobody\n/base A fine film.\n/quit\n")
    stdout, stderr = process.communicate(timeout=120)
    os.close(master)
    assert (
        process.returncode == 0
        and "Type a review" in stderr
        and f"no adapter 'nobody'; loaded: {trained.name}" in stderr
        and len(stdout) > 4
    )


@pytest.mark.parametrize("precision", ["fp4", "int8", "bf16", "fp32"])
def test_trains_on_every_precision(tiny_folder, tmp_path, precision):
    done = here(
        SCRIPTS[1],
        "--model",
        tiny_folder,
        "--output-dir",
        tmp_path / "run",
        *SMALL_RUN,
        "--precision",
        precision,
    )
    assert done.returncode == 0, done.stderr


def test_trains_an_architecture_of_other_names(tokenizer, tmp_path):
    # Pythia's layers hold a submodule called `dense`, once taken for a tensor of ours
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPTNeoXForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = here(SCRIPTS[1], "--model", tmp_path / "model", "--output-dir", tmp_path / "run", *SMALL_RUN)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_lm_reports_perplexity_before_and_after(tiny_folder, tmp_path):
    done = here(
        SCRIPTS[1],
        "--model",
        tiny_folder,
        "--output-dir",
        tmp_path / "run",
        *SMALL_RUN,
        "--objective",
        "lm",
        "--epochs",
        "4",
        "--learning-rate",
        "0.01",
    )
    assert done.returncode == 0, done.stderr
    perplexity = json.loads((tmp_path / "run" / "report.json").read_text())["evaluation"]["perplexity"]
    assert perplexity["after"]["perplexity"] < 0.97 * perplexity["before"]["perplexity"]


def test_own_data_pairs_and_labels(tiny_folder, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pd.DataFrame([{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(30)]).to_json(
        pairs, orient="records", lines=True
    )
    done = here(
        SCRIPTS[1], "--model", tiny_folder, "--output-dir", tmp_path / "a", *SMALL_RUN, "--dataset", pairs
    )
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    labels = tmp_path / "labels.csv"
    pd.DataFrame(
        [{"text": f"about {i}", "label": ("art", "{news}", "sport")[i % 3]} for i in range(30)]
    ).to_csv(labels, index=False)
    done = here(
        SCRIPTS[1], "--model", tiny_folder, "--output-dir", tmp_path / "b", *SMALL_RUN, "--dataset", labels
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b" / "qlora.json").read_text())["prompt"]["answers"] == [
        "art",
        "sport",
        "{news}",
    ]
    assert (
        json.loads((tmp_path / "b" / "report.json").read_text())["evaluation"]["base_few_shot"]["rows"] == 8
    )


def test_an_adapter_finds_its_base_from_another_folder(tiny_folder, tmp_path):
    done = script(
        SCRIPTS[1],
        "--model",
        tiny_folder.name,
        "--output-dir",
        tmp_path / "run",
        *SMALL_RUN,
        cwd=tiny_folder.parent,
    )
    assert done.returncode == 0, done.stderr
    asked = script(SCRIPTS[2], "--adapter", tmp_path / "run", "--max-new-tokens", "2", "Fine.", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert str(tiny_folder) in (tmp_path / "run" / "README.md").read_text()


def test_the_model_cards_code_for_a_gguf():
    # transformers refuses to read a GGUF file and quantize it in one call
    from qlora.training.report import loading_snippet

    base = {
        "public_name": "/models/base.GGUF",
        "dtype": "bfloat16",
        "revision": "gguf-sha256:0",
        "precision": "nf4",
    }
    note, code = loading_snippet(base).splitlines()
    assert (
        note.startswith("# Trained at nf4")
        and 'from_pretrained("/models", ' in code
        and 'gguf_file="base.GGUF"' in code
        and "BitsAndBytes" not in code
    )
    hub = loading_snippet({**base, "public_name": "a/b", "revision": "0" * 40})
    assert "\n" not in hub and "bnb_4bit_quant_type='nf4'" in hub and 'revision="000' in hub


def test_gradient_checkpointing_and_accumulation(tiny_folder, tmp_path):
    done = here(
        SCRIPTS[1],
        "--model",
        tiny_folder,
        "--output-dir",
        tmp_path / "run",
        *SMALL_RUN,
        "--gradient-checkpointing",
        "--grad-accum",
        "2",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["train"]["steps"] == 2


def test_accumulated_steps_equal_one_large_batch(tiny_folder, tmp_path):
    # Texts of different lengths: each token must weigh the same, in whichever step it stands.
    from safetensors.torch import load_file

    (tmp_path / "rows.csv").write_text(
        "text\n" + "".join(f"{'word ' * n} and {n}\n" for n in (3, 9, 20, 40, 5, 6))
    )
    flags = (
        "--model",
        tiny_folder,
        "--dataset",
        tmp_path / "rows.csv",
        "--objective",
        "lm",
        "--samples",
        "4",
        "--eval-samples",
        "2",
        "--max-length",
        "64",
        "--epochs",
        "6",
        "--precision",
        "fp32",
        "--lane",
        "fp32",
    )
    for name, more in (("one", ("--batch-size", "4")), ("two", ("--batch-size", "2", "--grad-accum", "2"))):
        done = here(SCRIPTS[1], *flags, "--output-dir", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-3 * one[name].norm(), name


def test_demo_untrained_adapter_is_the_base(tmp_path):
    done = here(SCRIPTS[0], "--untrained", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "the base's, bit for bit" in done.stdout and "134,515,008 parameters" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_nf4_as_the_script_writes_it_is_the_tables(name):
    import ast
    from pathlib import Path

    from conftest import ROOT

    from config import PRECISIONS

    calls = [
        node for node in ast.walk(ast.parse((ROOT / Path(name)).read_text())) if isinstance(node, ast.Call)
    ]
    written = next(call for call in calls if getattr(call.func, "id", "") == "BitsAndBytesConfig")
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in written.keywords}
    assert options.pop("bnb_4bit_compute_dtype").endswith(".dtype")
    options.pop("bnb_4bit_quant_storage", None)  # how the same values are stored, where the base is sharded
    assert {key: ast.literal_eval(value) for key, value in options.items()} == PRECISIONS["nf4"]


def labelled_csv(path, labels):
    pd.DataFrame([{"text": f"text number {i}", "label": labels[i % 2]} for i in range(30)]).to_csv(
        path, index=False
    )
    return path


def test_a_question_of_ones_own_travels_with_the_adapter(tiny_folder, tmp_path):
    spam, out = labelled_csv(tmp_path / "spam.csv", (0, 1)), tmp_path / "run"
    flags = ("--model", tiny_folder, "--output-dir", out, *SMALL_RUN, "--dataset", spam)
    done = here(SCRIPTS[1], *flags, "--question", "Is this spam?")
    assert done.returncode == 0, done.stderr
    prompt = json.loads((out / "qlora.json").read_text())["prompt"]
    assert prompt["user"] == "{text}\n\nIs this spam?" and prompt["answers"] == ["0", "1"]
    refused = here(SCRIPTS[1], *flags, "--overwrite", "--objective", "lm", "--question", "Is this spam?")
    assert refused.returncode == 2 and "--question" in refused.stderr
    # Labels of other names are matched with the adapter's answers by their order, and a note says so.
    named = labelled_csv(tmp_path / "named.csv", ("ham", "spam"))
    scored = [here(SCRIPTS[2], "--adapter", out, "--evaluate", "--dataset", data) for data in (spam, named)]
    assert [done.returncode for done in scored] == [0, 0], scored
    assert (
        "by their order: ham = 0, spam = 1" in scored[1].stderr and "by their order" not in scored[0].stderr
    )


def test_an_adapter_of_an_older_version_on_numbered_labels(trained, tmp_path):
    # it was asked the reviews' question and answers in words; the same file's labels are called 0 and 1 now
    import shutil

    data = labelled_csv(tmp_path / "old.csv", (0, 1))
    folder = shutil.copytree(trained, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*"))
    done = here(SCRIPTS[2], "--adapter", folder, "--evaluate", "--dataset", data, "--eval-samples", 8)
    assert done.returncode == 0 and "by their order: 0 = Negative, 1 = Positive" in done.stderr, done.stderr
