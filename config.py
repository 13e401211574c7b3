"""Every setting; the comment above it is its --help text. Nothing heavy is imported, so --help is quick."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional


def show_error(kind, error, trace) -> None:
    """Ctrl-C while the first imports run, before qlora.cli.run is there, is no error to trace."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show_error

try:
    from tyro.conf import Positional, UseAppendAction
except ModuleNotFoundError:  # every script imports this file first
    fix = "run `make setup`, then `. .venv/bin/activate`"
    raise SystemExit(f"error: the packages are not installed in this Python: {fix}") from None

ROOT = Path(__file__).resolve().parent
MODELS_DIR = ROOT / "models"

BUNDLED = "smollm2-135m"

# --model NAME -> hub id. Llama and Gemma are gated: their licences have to be accepted on the hub first.
MODELS = {
    BUNDLED: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2-2b": "google/gemma-2-2b-it",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "deepseek-coder-1.3b": "deepseek-ai/deepseek-coder-1.3b-instruct",
}

# --model auto on a GPU: the first one whose training step fits, by the memory plan.
GPU_DEFAULTS = ("llama-3.2-3b", "llama-3.2-1b")

# Models of like size that need no account, for --model auto where the hub refuses the gated one.
UNGATED = {"llama-3.2-3b": "qwen2.5-3b", "llama-3.2-1b": "qwen2.5-1.5b"}

# How the frozen base is held: what BitsAndBytesConfig is given, the name of a torch dtype, or as its files
# hold it (gptq, awq).
PRECISIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "gptq": None,
    "awq": None,
}
Precision = Literal[tuple(PRECISIONS)]


@dataclass(frozen=True)
class Variant:
    """A LoRA flavour: what it needs and how it begins; qlora/variants.py does what LoraConfig does not."""

    options: dict  # what LoraConfig is given
    # How the base has to be held: a 16-bit type can be decomposed, only a quantized one has lost something.
    weights: Literal["any", "16-bit", "quantized"] = "any"
    # What the untrained model is: the base, nearly the base, the base of which A and B hold a part that is
    # taken off the frozen weights, or nearer to the original weights than the quantized base.
    start: Literal["base", "nearly", "split", "original"] = "base"
    reads_rows: bool = False  # A is made from what training rows put into each layer


LORA_VARIANTS = {
    "lora": Variant({}),
    "rslora": Variant({"use_rslora": True}),
    "dora": Variant({"use_dora": True}, start="nearly"),
    # Sixteen passes of a randomized SVD find nearly what the exact one finds, in a fifth of the time.
    "pissa": Variant({"init_lora_weights": "pissa_niter_16"}, "16-bit", "split"),
    "olora": Variant({"init_lora_weights": "olora"}, "16-bit", "split"),
    "loftq": Variant({}, weights="quantized", start="original"),
    "eva": Variant({}, reads_rows=True),
}
LoraVariant = Literal[tuple(LORA_VARIANTS)]

# Types whose grid a merged weight can go through in training (qlora/qat.py).
QatType = Literal["Q4_0", "Q8_0", "int4", "fp8"]

# Where a run can be logged, by the names of transformers' report_to; packages: requirements-track.txt
Tracker = Literal["tensorboard", "trackio", "wandb", "none"]

# --target-modules NAME -> modules and rank: a small adapter, and one with room for a hard task.
NAMED_ADAPTERS = {"lite": ("attention", 32), "full": ("all-linear", 256)}

# What `--compare` can be given. torchao is optional: pip install -r requirements-bench.txt
COMPARABLE = (
    *("fp32", "bf16", "fp16", "int8", "int8-dynamic", "int8-static", "w4a8", "fp4", "nf4", "nf4-dq"),
    *("gptq", "awq", "int4", "int4-g64", "int4-sym", "int4-sym-g64", "mxfp4", "nvfp4"),
    *("torchao-int8wo", "torchao-int8dyn", "torchao-int4wo", "torchao-fp8"),
)

# How --combine adds adapters up, by PEFT's names.
COMBINATIONS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties")

PACKAGED_DATASETS = ("imdb", "rotten_tomatoes")  # by the packaged file's `source` column

SAMPLES = 2000  # training rows by default
EVAL_SAMPLES = 400  # held-out rows scored by default; at most a fifth of all rows

# Peak rates by default. Preferences: DPO's loss only compares, and at a high rate it drives both replies out.
LEARNING_RATE, PREFERENCE_RATE = 5e-4, 5e-5
FIND_LR_ROWS = 200  # rows to train on, and held-out rows to score, at each rate of --find-lr

# Short, because every row pays for these tokens again; benchmarks/recipe.md has what else was tried.
SENTIMENT_SYSTEM = "You judge movie reviews."
SENTIMENT_QUESTION = "Is this review positive or negative?"
SENTIMENT_ANSWERS = ("Negative", "Positive")

# Few-shot prompt of the untrained base. Written for this purpose: no row of any dataset is used.
FEW_SHOT = (
    ("A warm, funny film with wonderful actors. I loved every minute.", 1),
    ("Dull, badly acted and far too long. I want my two hours back.", 0),
    ("The plot makes no sense and the jokes fall flat. Avoid it.", 0),
    ("Beautifully shot and deeply moving. One of the best films of the year.", 1),
)

MERGE_KEEPS = 0.95  # share of an adapter's update that a merge has to keep, unless --force

# Training's constants that are not worth a flag.
MAX_GRAD_NORM = 1.0  # one odd review can't throw the run
KEEP_CHECKPOINTS = 2  # the newest may be the one that a full disk spoils
WATCHED_ROWS = 64  # held-out rows of --eval-steps: about ten steps' time on a CPU for a curve's point
PAD_MULTIPLE = 16  # few batch widths: a CPU's kernels are made once per width, and its heap stays tidy
CHUNK_POSITIONS = 1024  # positions whose logits exist at once: 1024 x 49152 in fp32 is 0.2 GB


Device = Literal["auto", "cuda", "cpu"]
Lane = Literal["auto", "fp32", "bf16", "fp16", "libraries"]


@dataclass
class ModelSettings:
    # A YAML file of settings, one `flag: value` a line; flags beside it win. configs/ has some, and each
    # training run writes its own, config.yaml.
    config: Optional[Path] = None
    # Preset, hub id, local folder, .gguf file, or one of the hub (owner/name:file.gguf). auto: on a GPU Llama
    # 3.2 (Qwen2.5 without access to it), else the bundled SmolLM2-135M.
    model: str = "auto"
    # auto: an NVIDIA GPU if one can be used, else the CPU. cuda: refuse to run without one.
    device: Device = "auto"
    # In what a CPU multiplies the frozen weights. auto: fp32, or what wins a short trial by 15%. libraries:
    # transformers, PEFT and bitsandbytes as they are.
    lane: Lane = "auto"
    # Tokens per row, prompt and answer together; longer reviews keep their end, where the verdict stands.
    max_length: int = 256
    # Rows per step on each device. Small batches make more updates of the same rows, and fit into 3 GB.
    batch_size: int = 4
    # Recompute activations in the backward pass: far less memory on a GPU, half the speed on a CPU.
    gradient_checkpointing: bool = False
    # Rank of each update BA.
    lora_r: int = 16
    # The update is scaled by alpha/r (rslora: alpha/sqrt(r)). Default: 2r.
    lora_alpha: Optional[int] = None
    # Dropout before A. A single epoch needs none; with it a CPU leaves the layers to the libraries, slower.
    lora_dropout: float = 0.0
    # all-linear, attention, module names (q_proj,v_proj), lite (attention, r 32) or full (all-linear, r 256).
    target_modules: str = "all-linear"
    # LoRA flavour. pissa and olora start from 16-bit weights (--precision bf16), loftq needs quantized ones,
    # eva reads training rows first; see docs/how-it-works.md.
    lora_variant: LoraVariant = "lora"
    # Draws the split, the order of rows, LoRA's A and samples.
    seed: int = 42


@dataclass
class TrainSettings(ModelSettings):
    # How the frozen base is held: nf4 is QLoRA; int8 and the 16/32-bit types train plain LoRA; gptq and awq
    # are for models that are quantized so. auto: nf4, or as such a model is; for a .gguf file its own values
    # in this hardware's dtype, so that what is deployed is what was trained on.
    precision: Literal["auto", Precision] = "auto"
    # imdb, rotten_tomatoes, a hub id, or a .csv/.tsv/.json/.jsonl/.parquet file (columns: text+label,
    # prompt+completion, instruction+response or output, messages, conversations, chosen+rejected, or text).
    # Several are joined; with weights, imdb:0.7 my.csv:0.3, each gives its share of the rows.
    dataset: tuple[str, ...] = ("imdb",)
    # Where these columns have other names: text=review label=stars.
    columns: Optional[tuple[str, ...]] = None
    # sentiment: answer with the label, loss on the answer. lm: labels = input ids, learn to write the text.
    # preference: of two replies make the chosen one likelier (DPO); a row of --batch-size is a pair.
    objective: Literal["sentiment", "lm", "preference"] = "sentiment"
    # --objective preference: how dear it is to leave the initial model; lower lets replies change more.
    beta: float = 0.1
    # Go on from a trained adapter instead of a fresh one: base, rank, targets and variant stay what they are.
    init_adapter: Optional[Path] = None
    # What is asked after each text of labelled data. Default: the movie reviews' question where labels are
    # named negative/positive, else "Which label fits: a, b, c?".
    question: Optional[str] = None
    # Training rows, drawn evenly from each label. Default: 2000, or what is there.
    samples: Optional[int] = None
    # Held-out rows scored before and after training (never trained on; the same rows whatever --samples is).
    # Default: 400, or a fifth of what is there.
    eval_samples: Optional[int] = None
    # Passes over the training rows.
    epochs: float = 1.0
    # Stop after this many optimizer steps instead of --epochs; -1: off.
    max_steps: int = -1
    # Fill rows of --max-length tokens with several examples that do not see each other; --batch-size counts
    # filled rows then. Worth it for lm and conversations of different lengths.
    packing: bool = False
    # Steps whose gradients are added up before one update.
    grad_accum: int = 1
    # Peak rate. LoRA needs about ten times the rate of full fine-tuning ("LoRA Without Regret"). Default:
    # 5e-4, with --objective preference 5e-5.
    learning_rate: Optional[float] = None
    # Instead of a run: train 200 rows from the same start at each of five rates, from a tenth of
    # --learning-rate to ten times it, and show losses and held-out scores. Writes nothing, chooses nothing.
    find_lr: bool = False
    # Quantization-aware: training rounds W + s B A as a file of this type will: GGUF's Q4_0 and Q8_0, int4
    # (symmetric, groups of 32), fp8 (E4M3, a scale a row). A CPU leaves the layers to the libraries, slower.
    qat: Optional[QatType] = None
    # Optimizer steps between checkpoints.
    save_steps: int = 100
    # Score the first 64 held-out rows each time so many steps are done: loss, and accuracy of labels.
    # Default: off.
    eval_steps: Optional[int] = None
    # Stop after this many scorings (--eval-steps) without a lower held-out loss, and save the adapter of the
    # step where it was lowest.
    early_stopping: Optional[int] = None
    # Where adapter, checkpoints and report go.
    output_dir: Path = Path("qlora-out")
    # Log the run for these programs, into --output-dir (wandb: to your account); see docs/watching.md.
    report_to: tuple[Tracker, ...] = ()
    # What trackers and the report call the run. Default: date, model, rank and rate.
    run_name: Optional[str] = None
    # Continue from the last complete checkpoint, or from the start; does nothing if the run is complete.
    resume: bool = False
    # Delete the earlier run in --output-dir first.
    overwrite: bool = False
    # Then upload adapter, card and report to this repository of the hub, you/name; see docs/hub.md. With
    # --resume and a complete run: nothing else.
    push_to_hub: Optional[str] = None
    # --push-to-hub: make the repository private.
    private: bool = False
    # Only score the adapter in --output-dir on the rows that its training held out; nothing is trained.
    test: bool = False
    # Train nothing and write nothing: show three rows as the model will see them, what is dropped or cut, row
    # lengths, and how many steps a run would make.
    preview: bool = False


@dataclass
class InferSettings:
    # A review (with --plain or no adapter: any message). Without it: lines of stdin, or a chat on a terminal.
    prompt: Positional[Optional[str]] = None
    # A YAML file of settings, one `flag: value` a line; flags beside it win.
    config: Optional[Path] = None
    # Adapter folder, qlora-out by default, or owner/name of the hub (owner/name@revision); give the flag once
    # per adapter (in a chat, /use NAME switches). none: the base alone.
    adapter: UseAppendAction[tuple[str, ...]] = ()
    # The base. auto: the one that the adapter was trained on.
    model: str = "auto"
    # auto: an NVIDIA GPU if one can be used, else the CPU. cuda: refuse to run without one.
    device: Device = "auto"
    # In what a CPU multiplies the frozen weights. auto: fp32, or what wins a short trial by 15%. libraries:
    # transformers, PEFT and bitsandbytes as they are.
    lane: Lane = "auto"
    # auto: what the adapter was trained on (for the base alone nf4, or as a GPTQ or AWQ model is quantized).
    precision: Literal["auto", Precision] = "auto"
    # A file with one prompt per line, answered in batches; for --answers also a .csv, .jsonl or .parquet.
    prompts: Optional[Path] = None
    # Write the answers to --prompts into this .csv or .jsonl file: the input's columns, then label,
    # probability of each label, answer. The same command again goes on where a stopped one ended.
    answers: Optional[Path] = None
    # Send the prompt as an ordinary chat message, without the adapter's question around it.
    plain: bool = False
    # Show the base's answer beside the adapter's.
    compare: bool = False
    # Score --dataset: accuracy with its 95% interval, confusion, and the base beside it with --compare.
    evaluate: bool = False
    # What --evaluate scores. auto: held-out rows of the dataset that the adapter was trained on.
    dataset: str = "auto"
    # Where its columns have other names: text=review label=stars. Default: as the adapter was trained on it.
    columns: Optional[tuple[str, ...]] = None
    # Rows for --evaluate. Default: those that training held out; of other data all there are, at most 400.
    eval_samples: Optional[int] = None
    # One table of the runs in these folders' subfolders, by date; without a folder: in the current one.
    runs: Optional[tuple[Path, ...]] = None
    # --evaluate: the base with so many training rows as examples in its prompt (0: none) beside the adapter.
    shots: Optional[tuple[int, ...]] = None
    # Write adapter and base as one plain model into this folder.
    merge: Optional[Path] = None
    # What --merge adds the adapter to: the values it was trained on, or the original 16-bit weights.
    merge_base: Literal["dequantized", "original"] = "dequantized"
    # What --merge writes. auto: fp16, which keeps small updates that bf16 rounds away; bf16 where numbers do
    # not fit into fp16.
    merge_dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    # Merge although little of the adapter's update would be left.
    force: bool = False
    # Add trained adapters up to a new one: FOLDER:WEIGHT …, the weight is 1 where none is given.
    combine: Optional[tuple[str, ...]] = None
    # cat: the exact sum, of the sum of the ranks. svd: the nearest to it of the largest rank. linear, ties,
    # dare_linear, dare_ties: A added to A and B to B, of equal ranks.
    combination: Literal[COMBINATIONS] = "cat"
    # Share of an adapter's entries that ties and dare keep. Default: 0.5.
    density: Optional[float] = None
    # Where --combine writes the new adapter.
    output_dir: Optional[Path] = None
    # Upload to this repository of the hub, you/name: what --merge writes, else the adapter, or with --adapter
    # none the folder --model. See docs/hub.md.
    push_to_hub: Optional[str] = None
    # --push-to-hub: make the repository private.
    private: bool = False
    # 0 is greedy: always the most likely token.
    temperature: float = 0.0
    # Sample from the smallest set of tokens with this much probability.
    top_p: float = 1.0
    # Sample from this many most likely tokens; 0: all.
    top_k: int = 0
    # Stop after this many tokens at the latest.
    max_new_tokens: int = 128
    # Prompts answered at once from a file or stdin.
    batch_size: int = 8
    # Makes sampling repeatable, and draws the rows of --evaluate as in training.
    seed: int = 42


@dataclass
class PlaygroundSettings:
    # Adapter folder, or owner/name of the hub; give the flag once per adapter. Default: qlora-out and the
    # adapters of the same base in other folders here; where there are none, the base alone.
    adapter: UseAppendAction[tuple[str, ...]] = ()
    # The base. auto: the one that the first adapter was trained on, without an adapter the bundled one.
    model: str = "auto"
    # auto: an NVIDIA GPU if one can be used, else the CPU. cuda: refuse to run without one.
    device: Device = "auto"
    # In what a CPU multiplies the frozen weights. auto: fp32, or what wins a short trial by 15%. libraries:
    # transformers, PEFT and bitsandbytes as they are.
    lane: Lane = "auto"
    # The one to begin with; the page can switch. auto: what the first adapter was trained on.
    precision: Literal["auto", Precision] = "auto"
    # Tokens of an answer at the most; the page can change it.
    max_new_tokens: int = 48
    # Makes sampling repeatable; base and adapter draw by the same random numbers.
    seed: int = 42
    # Where the page is served. Another address than this one lets other machines use it, without a password.
    host: str = "127.0.0.1"
    # Its port.
    port: int = 7860


@dataclass
class DemoSettings(ModelSettings):
    # How to hold the weights (of every part but --compare). auto: nf4, or as a GPTQ or AWQ model is.
    precision: Literal["auto", Precision] = "auto"
    # Only this part: one number and one block of 64 weights in every data type, bits spelled out.
    datatypes: bool = False
    # Only this part: the model's outline with shapes, dtypes and bytes.
    architecture: bool = False
    # Only this part: what LoRA adds, module type by module type; from the config alone, or of --adapter.
    ledger: bool = False
    # Only this part: untrained LoRA equals the base, and what filling B with noise would do.
    untrained: bool = False
    # Only this part: next-token distributions at several temperatures, top-p and top-k.
    sampling: bool = False
    # Only this part: will it fit? Bytes of training (of --batch-size rows of --max-length tokens), inference
    # and merging, counted without loading anything.
    plan: bool = False
    # --plan: also what training takes on so many GPUs, with a copy each (DDP) or the base sharded (FSDP).
    gpus: int = 1
    # Only this part: precisions side by side, as many as this hardware runs, or those named: fp32 bf16 fp16
    # int8 fp4 nf4 nf4-dq; gptq awq (made once, kept in models/); int4 int4-sym (groups of 32) int4-g64
    # int4-sym-g64 mxfp4 nvfp4; int8-dynamic int8-static w4a8 (activations in int8, too); torchao-int8wo
    # torchao-int8dyn torchao-int4wo torchao-fp8.
    compare: Optional[tuple[str, ...]] = None
    # What to sample from.
    prompt: str = "The best thing about small language models is"
    # Held-out IMDB rows for the zero-shot accuracy of --compare.
    eval_samples: int = 32
    # --compare: IMDB training rows that gptq, awq and int8-static look at first, never held-out ones.
    calibration_rows: int = 32
    # --compare: tokens of each of these rows.
    calibration_length: int = 256
    # --compare: inputs that share a scale in gptq and awq.
    group_size: int = 64
    # --ledger: a trained adapter's folder, for the size and effective rank of its updates.
    adapter: Optional[Path] = None
    # Where quantization.json and the pictures go.
    output_dir: Path = Path("quant-out")
