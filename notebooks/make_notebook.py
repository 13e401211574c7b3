"""Writes notebooks/qlora_t4.ipynb: the three scripts on a free GPU of Colab or Kaggle, or on a CPU.

    python notebooks/make_notebook.py            # write it (make figures does it too)
    python notebooks/make_notebook.py --check    # change nothing; exit 1 if the file is not what this makes

The notebook's commands are the scripts' own. Its seconds come from benchmarks/results/notebook.json, which
`python benchmarks/notebook_run.py` measures, and the tested range of torch from torch_versions.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOK = ROOT / "notebooks" / "qlora_t4.ipynb"

# The address of this repository, such as https://github.com/owner/name: where the notebook clones from, and
# what its badge opens in Colab. Empty: it asks for the address, and has no badge.
REPOSITORY = ""

TITLE = """
# QLoRA on a T4, from top to bottom

This notebook loads a language model in 4 bits, trains LoRA adapters on movie reviews, scores the same
reviews before and after, answers a review of your own, and ends with a GGUF file for llama.cpp and
Ollama. Each command is one that you could type in a terminal: the notebook has no training code of its
own.

- **Colab:** menu Runtime, Change runtime type, T4 GPU. **Kaggle:** in the settings, Accelerator GPU T4 x2
  and Internet on; one of the two GPUs is used.
- Without a GPU it runs as well, with the small model that comes from the package index.
- All cells can be run again: a finished training is not repeated, a stopped one goes on where it was.
- **On a T4 the notebook was not run yet, so there are no times for it.** Those in the texts were measured
  with the bundled model {where}: {total} in all.
"""

SETTINGS = """
## Settings

The one cell to edit. Another training needs another `NAME`: a folder holds one run.
"""

SETTINGS_CODE = """
REPOSITORY = "{repository}"  # address of the repository; not needed inside a copy of it
WORK = "notebook-run"  # everything that this notebook makes goes into this folder
NAME = "imdb"  # the adapter's name
MODEL = "auto"  # Llama 3.2 1B where your token may read it, else Qwen2.5 1.5B; without a GPU SmolLM2-135M
SIZES = {{  # rows to train on, held-out rows to score, tokens per row
    "cuda": (1000, 200, 256),
    "cpu": (128, 48, 96),
}}
LEARNING_RATE = 5e-4
LORA_R = 16
REVIEW = "The plot is thin, but the actors are wonderful and I left the cinema with a smile."
"""

REPOSITORY_TEXT = """
## The repository

Uses the copy that the notebook lies in. Elsewhere, in Colab for instance, it clones `REPOSITORY` into the
folder `qlora`. {repository_took}, with nothing to clone.
"""

REPOSITORY_CODE = """
import os
import sys
from pathlib import Path


def find_repository():
    \"\"\"The folder of the scripts: this one, one above it, or an earlier clone; None if there is none.\"\"\"
    for folder in (Path.cwd(), *Path.cwd().parents, Path.cwd() / "qlora"):
        if (folder / "qlora_finetune.py").is_file():
            return folder


# Set by every line that begins with an exclamation mark: what the command ended with, 0 if all went well.
_exit_code = 0
# `python` in a command is the Python of this notebook.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU where there are two
os.environ["GIT_TERMINAL_PROMPT"] = "0"  # a wrong address is an error, not a question for a password

if find_repository() is None:
    assert REPOSITORY, "REPOSITORY is empty: write the repository's address into the settings cell"
    !git clone --depth 1 {REPOSITORY} qlora
    assert _exit_code == 0, "git could not clone REPOSITORY: see above"
os.chdir(find_repository())
Path(WORK).mkdir(parents=True, exist_ok=True)
print(Path.cwd())
"""

PACKAGES = """
## Packages

Installs what requirements.txt pins, and leaves the installed torch as it is: it is the one that fits the
machine's driver. A short training was run with torch {oldest} and with {newest}. The other packages replace
those of the same name; pip may then list conflicts with programs that are not used here. PEFT refuses a
torchao older than 0.16, such as Colab's, so that is removed; nothing here needs it.

{packages_took}, with everything installed already. A first installation takes some minutes; how many depends
on the network.
"""

PACKAGES_CODE = """
from importlib import metadata


def version(name):
    \"\"\"'2.13.0' for an installed 2.13.0+cpu; None for a package that is not installed.\"\"\"
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def major_minor(text):
    return tuple(int(part) for part in text.split(".")[:2])


lines = [line.split("#")[0].strip() for line in Path("requirements.txt").read_text().splitlines()]
pins = dict(line.split("==") for line in lines if "==" in line)
torch = version("torch")
if torch is not None:
    assert major_minor(torch) >= major_minor("{oldest}"), f"torch {{torch}}: {oldest} or newer is needed"
    if major_minor(torch) > major_minor("{newest}"):
        print(f"note: torch {{torch}} is newer than {newest}, the newest that was tested")
    pins["torch"] = metadata.version("torch")

missing = [name for name, pin in pins.items() if version(name) != pin.partition("+")[0]]
if missing:
    wanted = " ".join(f"{{name}}=={{pin}}" for name, pin in pins.items())
    !python -m pip install --quiet --disable-pip-version-check {{wanted}}
    assert _exit_code == 0, "pip failed: see above"
torchao = version("torchao")
if torchao is not None and major_minor(torchao) < (0, 16):
    !python -m pip uninstall --quiet --yes torchao
print(f"torch {{metadata.version('torch')}}; installed: {{', '.join(missing) or 'nothing, all was there'}}")
"""

FOUND = """
## What was found

The GPU, its driver, and what the scripts make of it. If a GPU is listed here and the line `device` still
names a processor, torch can't use the GPU; the text then says why. {found_took}.
"""

FOUND_CODE = """
!nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null || echo "no NVIDIA driver"
!python -c "from qlora import hardware; hardware.show(hardware.detect())"
assert _exit_code == 0, "the packages do not work together: see above"
answer = !python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
DEVICE = answer[-1]
SAMPLES, EVAL_SAMPLES, MAX_LENGTH = SIZES[DEVICE]
"""

MODEL_TEXT = """
## The model

Llama 3.2 is gated: accept its licence on its page at Hugging Face, and keep a token of yours as the
secret `HF_TOKEN`, in Colab under the key symbol, in Kaggle under Add-ons, Secrets. Without that, Qwen2.5
is used, which needs no account. Without a GPU it is the bundled SmolLM2-135M, and the hub is not asked.
{model_took}.
"""

MODEL_CODE = """
try:
    from kaggle_secrets import UserSecretsClient

    read_secret = UserSecretsClient().get_secret
except ImportError:
    try:
        from google.colab import userdata

        read_secret = userdata.get
    except ImportError:  # neither Kaggle nor Colab
        read_secret = os.environ.get
try:
    token = read_secret("HF_TOKEN")
except Exception as error:  # no such secret, or this notebook may not read it; the sites' own kinds
    token = None
    print(f"no token: {error}")
if token:
    os.environ["HF_TOKEN"] = token

if MODEL == "auto" and DEVICE == "cpu":
    MODEL = "smollm2-135m"
elif MODEL == "auto":
    from qlora.hub import or_ungated

    MODEL, _ = or_ungated("llama-3.2-1b", "")  # it says which one and why
print(f"{MODEL}: {SAMPLES} rows of at most {MAX_LENGTH} tokens to train on, {EVAL_SAMPLES} held out")
"""

DEMO = """
## What 4 bits do, and what fits

Loads the model in NF4 and prints its outline: linear layers are stored in 4 bits, embeddings and norms
are not. Then it says what training, use and merging will take, here and on common GPUs. The model is
downloaded first. {demo_took}.
"""

DEMO_CODE = """
!python quant_llama32_4bit_lora.py --architecture --plan --model {MODEL} --max-length {MAX_LENGTH} \\
    --lora-r {LORA_R} --output-dir {WORK}/lab
assert _exit_code == 0, "it failed: see above"
"""

TRAIN = """
## Training, and the same reviews before and after

Trains LoRA on the frozen 4-bit model. The held-out reviews are scored three times: by the untrained
model, by the untrained model with four examples in its prompt, and by the trained one; a bag of words
learns from the same rows as a comparison. Watch the last `loss` fall, the guards hold, and `tuned` come
out above the base. With so few rows the intervals are wide.

{train_took}. If it is stopped on the way, run the cell again: it goes on from the last checkpoint, as
long as the machine is still there.
"""

TRAIN_CODE = """
!python qlora_finetune.py --model {MODEL} --samples {SAMPLES} --eval-samples {EVAL_SAMPLES} \\
    --max-length {MAX_LENGTH} --lora-r {LORA_R} --learning-rate {LEARNING_RATE} \\
    --output-dir {WORK}/{NAME} --resume
assert _exit_code == 0, "the training failed: see above"
"""

REPORT = """
## The report

What the run wrote beside the adapter: accuracy with intervals, reviews that training fixed and broke,
memory and speed, and the loss of every step. {report_took}.
"""

REPORT_CODE = """
import re

from IPython.display import Image, Markdown, display

report = Path(WORK, NAME, "report.md").read_text()
display(Markdown(re.sub(r"!\\[.*?\\]\\(.*?\\)", "", report)))  # a notebook does not show pictures of a folder
display(Image(filename=f"{WORK}/{NAME}/curves.png"))
"""

REVIEW_TEXT = """
## A review of your own

The question, the answers and the base are those of the training; they travel with the adapter.
`--compare` shows what the untrained model says to the same prompt. {review_took}.
"""

REVIEW_CODE = """
import shlex

quoted = shlex.quote(REVIEW)
!python qlora_inference.py --adapter {WORK}/{NAME} --compare {quoted}
assert _exit_code == 0, "it failed: see above"
"""

GGUF = """
## A GGUF file

Merges the adapter into the weights that it was trained on, and writes them as one f16 file, two bytes a
weight, for llama.cpp and Ollama. Only llama.cpp's converter is needed, which is fetched from the package
index; smaller types such as Q8_0 need llama.cpp built (`llama.cpp/build.sh`, which takes long on Colab's
two cores, so do it where you will use the file). {gguf_took}.
"""

GGUF_CODE = """
!python llama.cpp/source.py
assert _exit_code == 0, "llama.cpp's source could not be fetched: see above"
!python llama.cpp/export.py --adapter {WORK}/{NAME} --types f16 --output-dir {WORK}/gguf
assert _exit_code == 0, "the export failed: see above"
!ls -l {WORK}/gguf
"""

NEXT = """
## Keep what was made

The machine and its files vanish with the session. In Colab open the folder symbol on the left, in Kaggle
the output on the right, and download from `notebook-run`:

- `imdb/`: the adapter, some tens of megabytes; `python qlora_inference.py --adapter imdb` uses it anywhere
- `gguf/imdb-f16.gguf` and `Modelfile`: `ollama create my-model -f Modelfile`

More rows, other data and all flags: docs/settings.md and docs/own-data.md in the repository.
"""

CELLS = (  # (name, text above the cell, code); a name is the cell's id, and its time's in notebook.json
    ("settings", SETTINGS, SETTINGS_CODE),
    ("repository", REPOSITORY_TEXT, REPOSITORY_CODE),
    ("packages", PACKAGES, PACKAGES_CODE),
    ("found", FOUND, FOUND_CODE),
    ("model", MODEL_TEXT, MODEL_CODE),
    ("demo", DEMO, DEMO_CODE),
    ("train", TRAIN, TRAIN_CODE),
    ("report", REPORT, REPORT_CODE),
    ("review", REVIEW_TEXT, REVIEW_CODE),
    ("gguf", GGUF, GGUF_CODE),
)
PARAMETERS = ["parameters"]  # the tag by which papermill, and benchmarks/notebook_run.py, find the settings
FILLED = {"settings", "packages"}  # code with figures or the address in it; all other braces are IPython's


def main(argv: Sequence[str] | None = None) -> None:
    flags = sys.argv[1:] if argv is None else list(argv)
    if set(flags) - {"--check"}:
        sys.exit("error: the only flag is --check")
    text = json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"
    if not flags:
        NOTEBOOK.write_text(text)
    elif not NOTEBOOK.exists() or NOTEBOOK.read_text() != text:
        sys.exit(f"error: {NOTEBOOK.relative_to(ROOT)} is not up to date: run `make figures`")


def notebook() -> dict:
    """The whole file, in nbformat 4.5."""
    values = figures()
    cells = [markdown("title", badge() + TITLE.format(**values))]
    for name, text, source in CELLS:
        cells.append(markdown(f"about-{name}", text.format(**values)))
        cells.append(code(name, source.format(**values) if name in FILLED else source))
    cells.append(markdown("next", NEXT))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    colab = {"gpuType": "T4", "provenance": []}
    metadata = {
        "accelerator": "GPU",
        "colab": colab,
        "kernelspec": kernel,
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def figures() -> dict[str, str]:
    """What stands in braces in the texts: measured times, the tested range of torch, the address."""
    measured = json.loads((RESULTS / "notebook.json").read_text())
    runs = json.loads((RESULTS / "torch_versions.json").read_text())
    seconds = measured["seconds"]
    return {
        "where": f"on a CPU ({measured['device']}, {threads(measured['threads'])}) beside other programs",
        "total": duration(measured["all_seconds"]),
        "oldest": runs[0]["torch"],
        "newest": runs[-1]["torch"],
        "repository": REPOSITORY,
        **{f"{name}_took": f"On the CPU it took {duration(value)}" for name, value in seconds.items()},
    }


def duration(seconds: float) -> str:
    """0.2 -> 'less than a second', 48.3 -> '48 seconds', 150 -> '2.5 minutes'"""
    if seconds < 1:
        return "less than a second"
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def threads(count: int) -> str:
    """1 -> 'one thread', 2 -> '2 threads'"""
    return "one thread" if count == 1 else f"{count} threads"


def badge() -> str:
    """The button that opens the notebook in Colab; nothing while the repository has no address."""
    if not REPOSITORY:
        return ""
    path = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/{NOTEBOOK.relative_to(ROOT)}"
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({picture})](https://colab.research.google.com/github/{path})\n"


def markdown(name: str, text: str) -> dict:
    return {
        "cell_type": "markdown",
        "id": name,
        "metadata": {},
        "source": text.strip().splitlines(keepends=True),
    }


def code(name: str, source: str) -> dict:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": name,
        "metadata": {"tags": PARAMETERS} if name == "settings" else {},
        "outputs": [],
        "source": source.strip().splitlines(keepends=True),
    }


if __name__ == "__main__":
    main()
