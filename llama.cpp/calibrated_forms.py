"""GPTQ and AWQ of the merged model: what vLLM or transformers would be given, beside the GGUF files."""

from pathlib import Path

from ladder import Replies, bound, result
from qlora.adapters import Adapter
from qlora.calibrated import calibrated_folder, calibration_ids
from qlora.cli import UserError, note
from qlora.fast import make_fast
from qlora.hardware import detect
from qlora.loading import load_base
from qlora.weights import linear_layers
from reference import Questions, ask, label_odds

ROWS, LENGTH = 32, 256  # training reviews that are looked at, and tokens of each
GROUPS = (64, 32)  # inputs that share a scale: the first that fits


def measure_calibrated(
    method: str, aside: Path, adapter: Adapter, trained: Replies, questions: Questions
) -> dict:
    """The row of `aside`/merged quantized by `method`, compared with the trained model, by transformers."""
    facts = {"kind": "merged", "files": []}
    try:
        model, base, size = quantized(method, aside, "merged", adapter)
        make_fast(model)
        replies = ask(model, base, questions, f"merged {method}")
        facts |= {"bytes": size, "bits_per_weight": 8 * size / model_weights(model)}
        model, base, _ = quantized(method, aside, "base", adapter)
        make_fast(model)
        replies.base = label_odds(model, base, questions, f"base in {method}")
    except UserError as error:
        note(f"{method:14} broken: {error}")
        return {"name": method, **facts, "broken": [str(error)], "cause": None}
    return result(method, replies, trained, questions, bound("merged", method, False, adapter.qat), **facts)


def quantized(method: str, aside: Path, which: str, adapter: Adapter):
    """(model, its Base, bytes of its weights' files) of the folder `which` in `aside`."""
    plain = load_base(str(aside / which), "fp32", detect("fp32"))
    widths = [layer.in_features for _, layer in linear_layers(plain.model)]
    group = next((g for g in GROUPS if not any(width % g for width in widths)), GROUPS[-1])
    data = adapter.dataset
    ids = calibration_ids(plain.tokenizer, ROWS, LENGTH, data["eval_samples"], data["seed"])
    folder = calibrated_folder(plain, ids, method, group, aside)
    base = load_base(str(folder), method, detect(method))
    return base.model, base, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def model_weights(model) -> int:
    """Its numbers, those in codes included."""
    coded = sum(m.in_features * m.out_features for _, m in linear_layers(model))
    return coded + sum(p.numel() for p in model.parameters())
