"""What tutorials do with peft and transformers: train, resume if there is a checkpoint, answer.

    python benchmarks/trials/plain_trainer.py train MODEL DATA OUT
    python benchmarks/trials/plain_trainer.py answer ADAPTER PROMPT [MODEL]

It follows the examples of the libraries' own documentation: AutoModelForCausalLM and AutoTokenizer from a
path, LoraConfig, Trainer with a checkpoint each step, resume_from_checkpoint=True where there is one, and
save_pretrained at the end. Nothing is left out to make it fail.
"""

from __future__ import annotations

import sys


def train(model_path: str, data: str, out: str, steps: int = 3) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    set_seed(42)  # draws LoRA's A; without it two runs differ anyway
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"
    )
    model = get_peft_model(model, lora)
    rows = Dataset.from_pandas(read_table(data)).map(lambda row: encode(tokenizer, row))
    rows = rows.select_columns(["input_ids", "attention_mask"])
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=5e-3,
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, collator, rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True if get_last_checkpoint(out) else None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def read_table(path: str):
    import pandas as pd

    readers = {"csv": pd.read_csv, "parquet": pd.read_parquet}
    ending = str(path).rsplit(".", 1)[-1]
    return readers[ending](path) if ending in readers else pd.read_json(path, lines=True)


def encode(tokenizer, row: dict) -> dict:
    asked = f"{row['text']}\n\nIs this review positive or negative?"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(row["label"])}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return tokenizer(text, truncation=True, max_length=96, add_special_tokens=False)


def answer(adapter: str, prompt: str, model_path: str | None = None) -> None:
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_path = model_path or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(model_path)
    if adapter != "none":
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(model_path if adapter == "none" else adapter)
    turns = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**asked, max_new_tokens=4, do_sample=False)
    print(tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


def run(_argv=None) -> None:
    {"train": train, "answer": answer}[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    run()
