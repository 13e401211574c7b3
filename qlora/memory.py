"""What training, inference and merging will hold, predicted from a config: no weights, no GPU, any architecture.

One step of the code that will really run (transformers' model, PEFT, bitsandbytes, this repository's loss and fast
path, torch's AdamW) runs on tensors without data; `LiveBytes` counts.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from config import PAD_MULTIPLE
from qlora.cli import UserError
from qlora.live_bytes import LiveBytes

# cuBLAS takes its workspace from torch's allocator: 32 MiB on compute capability 9, 8.1 MiB before (torch's CUDA notes).
CUBLAS_WORKSPACE = {True: 32 * 2**20, False: 8 * 2**20 + 2**17}
CUDA_BLOCK = 512  # its allocator hands out multiples of this

KINDS = ("weights", "fast_copy", "adapters", "optimizer", "gradients", "activations", "logits", "temporaries")


@dataclass(frozen=True)
class Job:
    """What is to run; `dtype` is that of the matrix products."""

    precision: str = "nf4"
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    batch_size: int = 4
    length: int = 256
    lora_r: int = 16
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    lora_variant: str = "lora"
    gradient_checkpointing: bool = False
    every_token: bool = False  # loss at all positions (objective lm) instead of an answer's two
    hopper: bool = False  # compute capability 9 or newer


@contextmanager
def no_data(gpu: bool = False):
    """FakeTensorMode in which tensors that libraries keep for later are not mistaken for real ones.

    The tensors say that they are a CPU's, for this torch may know no CUDA device; `gpu` takes the road a GPU's would.
    """
    from bitsandbytes import functional
    from bitsandbytes.autograd import _functions as products

    from qlora import fast

    if "dynamic" not in functional.name2qmap:  # a cache of bitsandbytes' own: filled now, with real values
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()
    gc.freeze()  # the libraries' million objects need not be looked through again and again: a fifth faster
    # On a CPU, bitsandbytes trains int8 layers in floating point.
    int8_products = mock.patch.object(products, "MatMul8bitFp", products.MatMul8bitLt) if gpu else nullcontext()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), int8_products:
            yield
    finally:
        gc.unfreeze()
        fast._bias.clear()


def planned_model(config, job: Job, lora: bool = True):
    """The model with its quantized and LoRA layers in place, on the meta device: structure only. Call outside `no_data`."""
    from peft import get_peft_model
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    from qlora.ledger import lora_config, skeleton
    from qlora.loading import DTYPES, quantization_config

    dtype = DTYPES.get(job.precision, job.dtype)
    quantization = quantization_config(job.precision, dtype)
    if lora and job.lora_variant == "dora" and quantization is not None:
        raise UserError("DoRA on quantized weights can't be planned: PEFT reads the weights when it adds DoRA, and a plan has none")
    model = skeleton(config, dtype)
    with torch.device("meta"):
        if quantization is not None:
            replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit
        if not lora:
            return model
        return get_peft_model(model, lora_config(model, job.lora_r, None, job.target_modules, job.lora_variant, job.lora_dropout))


def refuse_other_kinds(config) -> None:
    """What is planned is a causal language model that attends as Llama does; raises UserError for the rest."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    reason = ("it is no causal language model" if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
              else "it has no attention" if not hasattr(config, "num_attention_heads")
              else "its attention caps its logits" if getattr(config, "attn_logit_softcapping", None) else "")
    if reason:
        raise UserError(f"a {config.model_type} model can't be planned: {reason}")


def fill(model, dtype: torch.dtype, live: LiveBytes | None = None, device: str = "cpu") -> None:
    """Give a skeleton its tensors, quantized as load_base does it: without data inside `no_data`, uninitialized elsewhere."""
    from qlora.loading import never_repack

    shared: dict = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = id(parameter)
            if live:
                live.tag = "adapters" if parameter.requires_grad else "weights"
            if key not in shared:
                shared[key] = (_quantized(module, dtype, device) if name == "weight" and hasattr(parameter, "quant_type")
                               else _int8(module, device) if name == "weight" and hasattr(parameter, "SCB")
                               else torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), requires_grad=parameter.requires_grad))
            module._parameters[name] = shared[key]
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    never_repack(model)


def _quantized(linear, dtype, device) -> torch.nn.Parameter:
    """bitsandbytes' own 4-bit quantization of a weight without data: packed bytes, block constants, tables."""
    from bitsandbytes import functional

    old = linear.weight
    packed, state = functional.quantize_4bit(torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=device), blocksize=old.blocksize,
                                             compress_statistics=old.compress_statistics, quant_type=old.quant_type)
    weight = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_state, weight.quant_type, weight.compress_statistics, weight.blocksize = state, old.quant_type, old.compress_statistics, old.blocksize
    weight.bnb_quantized, weight.quant_storage = True, old.quant_storage
    linear.quant_state = state
    return weight


def _int8(linear, device) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.empty(linear.out_features, linear.in_features, dtype=torch.int8, device=device), requires_grad=False)
    weight.CB, weight.SCB = weight.data, torch.empty(linear.out_features, dtype=torch.float32, device=device)
    weight.has_fp16_weights = False
    linear.state.threshold = 0.0  # which columns are outliers depends on the data; they are few
    return weight


def predict_training(config, job: Job) -> dict:
    """Bytes at the peak of a training step in its steady state (optimizer state there already), by what they are for.

    weights: the frozen base as held; fast_copy: its dequantized values (CPU only); adapters, gradients, optimizer: of
    LoRA; activations: kept from forward to backward; logits: of the loss; temporaries: the rest.
    """
    from qlora.fast import attention, speed_up_base, speed_up_lora
    from qlora.logits import loss_at_labels

    gpu = job.device == "cuda"
    live = LiveBytes(block=CUDA_BLOCK if gpu else 1, workspace=cuda_workspace if gpu else None)

    def pick(hidden, labels):
        """As many positions as there will be labels; from here on it is the loss that holds memory."""
        live.tag = "logits"
        count = hidden.shape[1] - 1 if job.every_token else 2
        return hidden[:, :count].reshape(-1, hidden.shape[-1]).clone(), labels[:, :count].reshape(-1).clone()

    model = planned_model(config, job)
    lm = model.get_base_model()
    with no_data(gpu), live:
        fill(model, lm.dtype, live)
        live.tag = "fast_copy"
        if not gpu:
            speed_up_base(lm)
        attend(lm, gpu_attention if gpu else attention)
        loss_at_labels(lm, pick)
        if job.gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not gpu:
            speed_up_lora(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # the Trainer's default
        live.tag = "optimizer"
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: live.retag(p.grad, "gradients"))
        model.train()
        live.tag = "activations"
        ids = torch.empty(job.batch_size, -(-job.length // PAD_MULTIPLE) * PAD_MULTIPLE, dtype=torch.long)
        live.start_peak()
        with torch.autocast("cpu", dtype=job.dtype, enabled=gpu and job.dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        live.tag = "temporaries"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    parts = {kind: live.at_peak.get(kind, 0) for kind in KINDS}
    parts["temporaries"] += live.at_peak.get("workspace", 0) + (CUBLAS_WORKSPACE[job.hopper] if gpu else 0)
    return {**parts, "peak": sum(parts.values())}


def predict_inference(config, job: Job) -> dict:
    """Bytes at the peak of reading `batch_size` prompts of `length` tokens: with base, adapter and KV cache, no gradients."""
    from qlora.fast import attention

    gpu = job.device == "cuda"
    live = LiveBytes(block=CUDA_BLOCK if gpu else 1, workspace=cuda_workspace if gpu else None)
    model = planned_model(config, job)
    with no_data(gpu), live, torch.inference_mode():
        fill(model, model.get_base_model().dtype, live)
        attend(model.get_base_model(), gpu_attention if gpu else attention)
        live.tag = "temporaries"
        live.start_peak()
        ids = torch.empty(job.batch_size, job.length, dtype=torch.long)
        with torch.autocast("cpu", dtype=job.dtype, enabled=gpu and job.dtype != torch.float32):
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        if out.past_key_values is None:
            raise UserError(f"a {config.model_type} model can't be planned: it keeps no keys and values from one token to the next")
        cache = sum(t.untyped_storage().nbytes() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    held = {"weights": live.live["weights"], "adapters": live.live["adapters"], "kv_cache": cache}
    peak = live.peak + (CUBLAS_WORKSPACE[job.hopper] if gpu else 0)
    return {**held, "temporaries": peak - sum(held.values()), "peak": peak}


def predict_merge(config, job: Job) -> dict:
    """RAM and disk of `qlora_inference.py --merge`: base and adapter as trained beside one 16-bit model, which is written."""
    sixteen, adapted = weights_bytes(config, Job(precision="bf16")), planned_model(config, job)
    adapters = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    return {"ram": weights_bytes(config, job) + adapters + sixteen, "disk": sixteen}


def weights_bytes(config, job: Job) -> int:
    """What the base alone holds, quantization constants and buffers included."""
    live, model = LiveBytes(), planned_model(config, job, lora=False)
    with no_data(), live:
        fill(model, model.dtype)
    return live.now


def predict(what, config, job: Job) -> dict:
    """`what` (one of the predictions) for all layers: extrapolated from 2 and 3 where the layers are alike, else in full.

    Layers that hold alike make every figure a straight line in their number; the parameter count is the check.
    """
    layers = config.num_hidden_layers
    if layers <= 3 or not _alike(config.to_json_string(use_diff=False), type(config)):
        return what(config, job)
    two, three = (what(_first_layers(config, n), job) for n in (2, 3))
    return {kind: _extrapolate(two[kind], three[kind], layers) for kind in two}


@functools.cache
def _alike(config_json: str, kind: type) -> bool:
    config = kind(**json.loads(config_json))
    if len(set(getattr(config, "layer_types", None) or ())) > 1:  # sliding and full attention in turn, say
        return False
    shapes = [_first_layers(config, 2), _first_layers(config, 3), config]
    two, three, all_of_them = (planned_model(c, Job(precision="bf16"), lora=False).num_parameters() for c in shapes)
    return all_of_them == _extrapolate(two, three, config.num_hidden_layers)


def _extrapolate(two: int, three: int, layers: int) -> int:
    return two + (three - two) * (layers - 2)


def _first_layers(config, layers: int):
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:layers]
    return shallow


def attend(model, attention) -> None:
    """Let `model` attend by this function and make no mask: asked whether rows are packed, tensors without data can't say no."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = f"planned_{attention.__name__}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)


def gpu_attention(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What FlashAttention keeps: q, k, v, its output and one number a row; grouped heads are not repeated.

    Its shapes, by the CPU's operator: this torch may know no CUDA device.
    """
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def cuda_workspace(function, args, out) -> int:
    """Bytes that CUDA kernels of this path allocate inside, read in their sources (bitsandbytes 0.50.2, torch 2.13)."""
    name = function.name()
    if name == "bitsandbytes::gemm_4bit":  # long inputs: dequantize, then multiply
        rows, columns = args[2]
        return rows * columns * args[0].element_size()
    if name == "bitsandbytes::int8_scaled_mm":  # sums in int32, scaled into the output afterwards
        return out.numel() * 4
    if "flash_attention" in name and "backward" in name:  # dq summed in fp32; dk and dv for every head, then summed by group
        q, k = args[1], args[2]
        return q.numel() * 4 + (2 * q.numel() * q.element_size() if k.shape[1] != q.shape[1] else 0)
    return 0
