"""Model cards for the hub: the front matter that it reads, and the text around what was measured."""

import json
import os
from pathlib import Path

from config import MODELS
from qlora.hub import REPOSITORY

# Packaged datasets by their names on the hub.
DATASETS = {"imdb": "stanfordnlp/imdb", "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes"}
# By how a hub id begins: what the base's owner asks of models that are made of it. Others: as its card says.
LICENSES = {
    **dict.fromkeys(("HuggingFaceTB/SmolLM", "Qwen/Qwen3", "mistralai/Mistral-7B"), "apache-2.0"),
    **dict.fromkeys((f"Qwen/Qwen2.5-{size}B" for size in ("0.5", "1.5", "7")), "apache-2.0"),
    "meta-llama/Llama-3.1": "llama3.1",
    "meta-llama/Llama-3.2": "llama3.2",
    **dict.fromkeys(("google/gemma-2", "google/gemma-3"), "gemma"),
    "microsoft/Phi-3.5": "mit",
}
PEFT, PLAIN = {"library_name": "peft"}, {"library_name": "transformers"}


def short(name: str) -> str:
    """A file or folder by its last name alone, as others may read it; presets and hub ids as they are."""
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def short_all(names: str) -> str:
    """Names with spaces between them, each by its last one; of many the first: 'a.csv and 11 more'"""
    if os.path.exists(names):
        return short(names)
    first, *others = [short(name) for name in names.split(" ")] or [""]
    return f"{first} and {len(others)} more" if len(others) > 2 else " + ".join([first, *others])


def hub_id(name: str) -> str | None:
    """'imdb' and a preset -> their hub ids; None for what is no hub id."""
    name = DATASETS.get(name) or MODELS.get(name) or name
    return name if REPOSITORY.fullmatch(name) and not os.path.exists(name) else None


def front_matter(base: str, dataset: str = "", scores: dict | None = None, **about) -> str:
    """YAML between two lines of dashes. `scores`: the report's evaluation of labelled rows.

    What is not on the hub (a local base, an own dataset) is left out: the hub makes links of it.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base, data = hub_id(base), hub_id(dataset)
    facts = {"base_model": base, "pipeline_tag": "text-generation", "tags": ["qlora", "lora"]}
    facts["license"] = next(
        (name for start, name in LICENSES.items() if (base or "").startswith(start)), None
    )
    facts["datasets"] = [data] if data else None
    if scores:
        facts["metrics"] = ["accuracy"]
        best = scores.get("tuned_on_others") or scores["tuned"]  # not the rows that chose the step
    if scores and data:  # a table of results names a dataset of the hub
        facts["model_name"] = about.pop("model_name", f"{base or 'model'} + LoRA")
        what = {
            "metric_name": f"accuracy on {best.get('rows', scores['rows'])} held-out rows",
            "metric_type": "accuracy",
        }
        value = round(best["accuracy"], 4)
        task = {"task_type": "text-classification", "dataset_type": data, "dataset_name": dataset}
        facts["eval_results"] = [EvalResult(**task, **what, metric_value=value)]
    return f"---\n{ModelCardData(**(facts | about)).to_yaml()}\n---\n"


def plain_card(name: str, base: str, messages: list[dict], **about) -> str:
    """Of what no report was written for: an adapter of another tool, a merged model, GGUF files."""
    title = f"# {name}\n\nMade of {hub_id(base) or short(base) or 'an unnamed base'} with QLoRA."
    return f"{front_matter(base, **about)}{title}\n{prompt_section(messages)}"


def prompt_section(messages: list[dict]) -> str:
    """Markdown that shows how the model was asked in training."""
    if not messages:
        return ""
    told = "It was trained on this prompt; with another it answers otherwise:"
    return f"\n{told}\n\n```json\n{json.dumps(messages, indent=2, ensure_ascii=False)}\n```\n"


def gguf_card(repo: str, base: str, messages: list[dict], files: list[Path], flags: str) -> str:
    """`files`: the GGUF files; `flags`: of llama-cli, for the prompt that it was trained on."""
    about = {"base_model_relation": "quantized", "tags": ["gguf", "qlora", "lora"]}
    card = plain_card(
        repo.split("/")[1], base, messages, **(about if hub_id(base) else {"tags": about["tags"]})
    )
    rows = "\n".join(f"- {file.name}: {file.stat().st_size / 1e6:.1f} MB" for file in files)
    lora = any("lora" in file.name for file in files)
    first = f"-m {files[0].name} --lora {files[1].name}" if lora else f"-hf {repo} --hf-file {files[0].name}"
    return f"{card}\n{rows}\n\n```\nllama-cli {first} {flags}\n```\n"
