"""Whether the decoder of this folder can take a model's place, and the trial that chooses its products."""

import psutil
import torch

from qlora.cpu.decoder import Decoder
from qlora.cpu.lanes import LANES
from qlora.weights import linear_layers

# transformers' classes whose layers are Llama's: RMS norms, rotary embedding, grouped heads, SwiGLU.
LIKE_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # rotary embeddings that do not depend on the row
MEMORY_SHARE = 0.6  # of the memory that is free, for the copy of the frozen values


def attach(model, lm, lane: str) -> tuple[Decoder | None, str]:
    """(the decoder that is now in `lm.cpu_decoder`, how it computes) or (None, why not)."""
    if reason := why_not(model, lm, lane):
        return None, reason
    lm.cpu_decoder = Decoder(lm, lane)
    return lm.cpu_decoder, lm.cpu_decoder.how


def why_not(model, lm, lane: str) -> str:
    """What this decoder does not do and the libraries do; "" if there is nothing."""
    if lane not in LANES:
        return "--lane libraries"
    kind, c = type(lm).__name__, lm.config
    if kind not in LIKE_LLAMA:
        return f"{kind} is not built like Llama"
    rope = getattr(lm.model.rotary_emb, "rope_type", "default")
    sliding = getattr(c, "use_sliding_window", True) and getattr(c, "sliding_window", None)
    if c.hidden_act != "silu" or rope not in FIXED_ANGLES or sliding:
        return f"its activation ({c.hidden_act}), rotary embedding ({rope}) or window is another"
    if any(getattr(module, "gradient_checkpointing", False) for module in lm.modules()):
        return "gradient checkpointing"
    lora = [module for module in lm.modules() if hasattr(module, "lora_A")]
    if reasons := [*filter(None, map(unusual_adapter, lora))]:
        return reasons[0]
    others = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if lora and others:
        return f"{others[0]} is trained as well"
    size = 2 if lane == "bf16" else 4  # fp16 weights are packed twice
    needed = sum(layer.out_features * layer.in_features for _, layer in linear_layers(lm)) * size
    free = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        return f"the frozen values would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free"
    return ""


def unusual_adapter(module) -> str:
    """What a PEFT layer does besides s B A x; "" if nothing."""
    if not isinstance(module.get_base_layer(), torch.nn.Linear):
        return "LoRA on a layer that is not linear"
    if any(getattr(dropout, "p", 0.0) for dropout in module.lora_dropout.values()):
        return "LoRA's dropout"
    if module.lora_variant:
        return "DoRA or another variant of LoRA"
    if getattr(module, "grids", None):
        return "quantization-aware training"
    if any(bias for bias in getattr(module, "lora_bias", {}).values()):
        return "LoRA with a bias"
    return ""


def usable(lm) -> Decoder | None:
    """The decoder in `lm`, unless adapters are merged, several are switched on, or all of it is trained."""
    decoder = getattr(lm, "cpu_decoder", None)
    if decoder is None or torch.is_grad_enabled() and lm.get_input_embeddings().weight.requires_grad:
        return None
    lora = [module for module in lm.modules() if hasattr(module, "lora_A")]
    if any(module.merged or len(module.active_adapters) > 1 for module in lora):
        return None
    return decoder
