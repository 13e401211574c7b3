"""What TRL, Axolotl, LLaMA-Factory, Unsloth, mlx-lm and courses call our settings; for flags and for
keys of a --config file.

A name that is a setting of the script is never touched, and _ and - are the same in names.
"""

import itertools
from collections.abc import Collection

ANY = "*"  # any value
NF4, INT8, HALF = ("precision", "nf4"), ("precision", "int8"), ("precision", "bf16")
NOT_NEEDED = None  # so it is done here anyway
VALUED = ("resume_from_checkpoint",)  # a word always follows: True, or a folder
JOINED = ("target_modules",)  # one text here, a list elsewhere: q_proj v_proj -> q_proj,v_proj

# Name elsewhere -> our setting, or for each of its values (setting, value) here.
ALIASES: dict[str, str | dict[str, tuple[str, object] | None]] = {
    **dict.fromkeys(("model_name_or_path", "model_name", "model_id", "base_model"), "model"),
    **dict.fromkeys(("dataset_name", "dataset_path", "data_path", "train_file", "data"), "dataset"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size"), "batch_size"),
    "gradient_accumulation_steps": "grad_accum",
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"), "max_length"),
    "lr": "learning_rate",
    **dict.fromkeys(("lora_rank", "rank", "r"), "lora_r"),
    **dict.fromkeys(("lora_target_modules", "lora_target"), "target_modules"),
    "lora_target_linear": {"true": ("target_modules", "all-linear")},
    **dict.fromkeys(("max_samples", "max_train_samples", "num_samples"), "samples"),
    "max_eval_samples": "eval_samples",
    "sample_packing": "packing",
    "iters": "max_steps",
    **dict.fromkeys(("random_state", "random_seed"), "seed"),
    "max_tokens": "max_new_tokens",
    "early_stopping_patience": "early_stopping",
    **dict.fromkeys(("dpo_beta", "pref_beta"), "beta"),
    "qlora_bits": {"4": NF4, "8": INT8, "16": HALF},
    "quantization_bit": {"4": NF4, "8": INT8},
    "load_in_4bit": {"true": NF4},
    "load_in_8bit": {"true": INT8, "false": NOT_NEEDED},
    "adapter": {"qlora": NF4},
    "bnb_4bit_quant_type": {"nf4": NF4, "fp4": ("precision", "fp4")},
    "use_dora": {"true": ("lora_variant", "dora"), "false": NOT_NEEDED},
    "use_rslora": {"true": ("lora_variant", "rslora"), "false": NOT_NEEDED},
    "use_gradient_checkpointing": {
        **dict.fromkeys(("true", "unsloth"), ("gradient_checkpointing", True)),
        "false": ("gradient_checkpointing", False),
    },
    "overwrite_output_dir": {"true": ("overwrite", True), "false": NOT_NEEDED},
    "resume_from_checkpoint": {"true": ("resume", True), "false": NOT_NEEDED},
    "use_cpu": {"true": ("device", "cpu"), "false": NOT_NEEDED},
    "stage": {"sft": NOT_NEEDED, "pt": ("objective", "lm"), "dpo": ("objective", "preference")},
    # What is done here anyway.
    **dict.fromkeys(("use_peft", "do_train", "do_eval", "train", "save_model"), {"true": NOT_NEEDED}),
    **dict.fromkeys(("bf16", "fp16", "tf32"), dict.fromkeys(("true", "false", "auto"), NOT_NEEDED)),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "use_bnb_nested_quant"), {"true": NOT_NEEDED}),
    **dict.fromkeys(("bnb_4bit_compute_dtype", "torch_dtype", "dtype", "logging_steps"), {ANY: NOT_NEEDED}),
    **dict.fromkeys(("logging_strategy", "per_device_eval_batch_size"), {ANY: NOT_NEEDED}),
    **dict.fromkeys(("model_type", "tokenizer_type", "dataset_prepared_path"), {ANY: NOT_NEEDED}),
    **dict.fromkeys(("finetuning_type", "fine_tune_type", "peft_type"), {"lora": NOT_NEEDED}),
    "task_type": {"causal_lm": NOT_NEEDED},
    "bias": {"none": NOT_NEEDED},
    "optim": {"adamw_torch": NOT_NEEDED, "adamw_torch_fused": NOT_NEEDED},
    "optimizer": {"adamw_torch": NOT_NEEDED, "adamw_torch_fused": NOT_NEEDED},
    "lr_scheduler_type": {"linear": NOT_NEEDED},
    "lr_scheduler": {"linear": NOT_NEEDED},
    "weight_decay": {"0": NOT_NEEDED, "0.0": NOT_NEEDED},
    "max_grad_norm": {"1": NOT_NEEDED, "1.0": NOT_NEEDED},
    "warmup_ratio": {"0.05": NOT_NEEDED},
    "group_by_length": {"true": NOT_NEEDED},
    "train_on_inputs": {"false": NOT_NEEDED},
    "completion_only_loss": {"true": NOT_NEEDED},
    "trust_remote_code": {"false": NOT_NEEDED},
    "dataset_text_field": {"text": NOT_NEEDED},
    **dict.fromkeys(("save_strategy", "eval_strategy"), {"steps": NOT_NEEDED}),
    **dict.fromkeys(("flash_attention", "xformers_attention", "debug"), {"false": NOT_NEEDED}),
}

_SCHEDULE = "the rate rises in the first 5% of the steps and falls linearly to zero (training_arguments)"
_ATTENTION = "attention is PyTorch's own; leave it out"
_LOSS = "loss is taken on the answer, or with --objective lm on the whole text"
_TEMPLATE = "the model's own chat template and end token are used; leave it out"
_SHARDED = "several GPUs: start the script with torchrun or accelerate launch (docs/gpu.md); leave it out"
_GGUF = "export with python llama.cpp/export.py --types Q4_K_M"

# Name elsewhere -> how it is done here, where no setting stands for it.
ELSEWHERE: dict[str, str] = {
    "adapter": "precision: bf16 is LoRA on 16 bits, int8 on 8, nf4 is QLoRA",
    "load_in_4bit": "say how the base is held instead, --precision int8 or bf16",
    "datasets": "one flat setting, dataset: a file or owner/name; its format shows in its columns",
    "val_set_size": "--eval-samples, a number of rows",
    "dataset_text_field": "--columns text=NAME",
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "evals_per_epoch"), "--eval-steps N"),
    **dict.fromkeys(("wandb_project", "wandb_entity"), "--report-to wandb; wandb reads WANDB_PROJECT"),
    **dict.fromkeys(("hub_model_id", "hub_path"), "--push-to-hub you/name"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "warmup_ratio", "warmup_steps"), _SCHEDULE),
    **dict.fromkeys(("optim", "optimizer"), "always torch's AdamW: LoRA's state is small; leave it out"),
    "weight_decay": "none: LoRA's rank is the regularizer (training_arguments)",
    "max_grad_norm": "gradients are clipped to 1 (MAX_GRAD_NORM in config.py)",
    "save_total_limit": "two checkpoints are kept (KEEP_CHECKPOINTS in config.py); leave it out",
    **dict.fromkeys(("save_strategy", "saves_per_epoch"), "--save-steps N"),
    **dict.fromkeys(("finetuning_type", "fine_tune_type"), "always LoRA; flavours are --lora-variant"),
    **dict.fromkeys(("adapter_path", "save_path"), "--output-dir FOLDER in training, then --adapter FOLDER"),
    "num_layers": "LoRA goes into all layers; leave it out",
    **dict.fromkeys(("train_on_inputs", "completion_only_loss", "assistant_only_loss"), _LOSS),
    **dict.fromkeys(("template", "chat_template", "eos_token", "special_tokens"), _TEMPLATE),
    **dict.fromkeys(("flash_attention", "attn_implementation", "xformers_attention"), _ATTENTION),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "distributed_type"), _SHARDED),
    **dict.fromkeys(
        ("hub_token", "hf_token"), "`hf auth login`, or HF_TOKEN; never a flag, which others can read"
    ),
    "trust_remote_code": "code of a model's author is never run; leave it out",
    "resume_from_checkpoint": "--resume goes on from the newest whole checkpoint in --output-dir",
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save"), "only LoRA is trained; leave it out"),
    **dict.fromkeys(("merge_adapter", "export_dir"), "python qlora_inference.py --merge FOLDER"),
    **dict.fromkeys(("save_method", "quantization_method"), _GGUF),
    "model_path": "python qlora_inference.py --adapter FOLDER; a server: llama.cpp/serve.sh",
    **dict.fromkeys(("use_vllm", "use_liger_kernel", "use_unsloth"), "not used here; leave it out"),
    "neftune_noise_alpha": "there is no such noise here; leave it out",
}


def look_up(name: str, value: object, known: Collection[str]) -> tuple[str, object] | None:
    """(our setting, its value) for a name with _ for -; None where it needs none.

    `known`: the script's settings. Raises ValueError with how it is done here, KeyError for an unknown name.

    'lora_rank', '8' -> ('lora_r', '8');  'qlora_bits', 4 -> ('precision', 'nf4');  'use_peft', True -> None
    """
    if name in known:
        return name, value
    meant = ALIASES.get(name)
    if isinstance(meant, str) and meant in known:
        return meant, value
    if isinstance(meant, dict):
        said = str(value).lower()
        found = meant.get(said if said in meant else ANY, ("", None))
        if found is None or found[0] in known:
            return found
        if not found[0] and name not in ELSEWHERE:
            raise ValueError(f"{name} {value}: here it is {' or '.join(meant)}")
    if name in ELSEWHERE:
        raise ValueError(f"{name}: {ELSEWHERE[name]}")
    raise KeyError(name)


def translate(words: list[str], known: Collection[str], switches: Collection[str]) -> tuple[list, list, list]:
    """(a command line in our own names, what of it is not needed here, problems in a line each).

    `known`: the script's settings; `switches`: those of them that are flags without a value.

    ['--lora_rank=8', '--use_peft', '--resume', 'True'] -> ['--lora-r=8', '--resume'], ['--use_peft'], []
    """
    left, ours, not_needed, problems = list(words), [], [], []
    chosen: dict[str, str] = {}  # setting -> the word that chose its value
    while left:
        flag, equals, value = left.pop(0).partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name not in known and isinstance(ALIASES.get(name), str) and ALIASES[name] in known:
            name = ALIASES[name]
            flag = dashed(name)
        if name in known or name not in ALIASES and name not in ELSEWHERE:
            ours += own_flag(name, flag, equals + value, left, switches)
            continue
        values = ALIASES[name] if isinstance(ALIASES.get(name), dict) else {}
        bare = (
            "true" in values
            and name not in VALUED
            and (not left or left[0].lower() not in (*values, "true", "false"))
        )
        if values and not equals and left and not bare and left[0][:2] != "--":
            value = left.pop(0)
        said = f"{flag} {value}".strip()
        try:
            found = look_up(name, value or "true", known)
        except KeyError:  # of another script: the parser says that it is unknown
            ours += [flag + equals + value] if equals else [flag, *[value] * bool(value)]
        except ValueError as problem:
            problems.append(f"--{problem}")
        else:
            if found is None:
                not_needed.append(said)
                continue
            setting, value = found
            if chosen.setdefault(setting, str(value)) != str(value):
                problems.append(f"{said}: another flag says {dashed(setting)} {chosen[setting]}; keep one")
            ours += [dashed(setting, value is not False)] + [str(value)] * (not isinstance(value, bool))
    return ours, not_needed, problems


def own_flag(name: str, flag: str, value: str, left: list[str], switches: Collection[str]) -> list[str]:
    """Our own flag with the values that others give it: `True` after a switch, module names as several words.

    `value` is "" or "=…"; values that are words of their own are taken off `left`.
    """
    following = value[1:] if value else left[0] if left else ""
    if name in switches and following.lower() in ("true", "false"):
        if not value:
            del left[0]
        return [dashed(name, following.lower() == "true")]
    if name in JOINED and not value:
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), left))
        del left[: len(names)]
        return [flag, ",".join(names)] if names else [flag]
    return [flag + value]


def dashed(name: str, on: bool = True) -> str:
    """lora_r -> --lora-r; with `on` false --no-lora-r, which turns a switch off"""
    return ("--" if on else "--no-") + name.replace("_", "-")
