"""What training, inference and merging will hold, predicted from a config: no weights, no GPU.

One step of the code that will really run (transformers' model, PEFT, bitsandbytes, this repository's loss and
fast path, torch's AdamW) runs on tensors without data; `LiveBytes` counts. It works for any architecture.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions as products
from peft import get_peft_model
from torch._subclasses.fake_impls import register_op_impl
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager
from transformers import AttentionInterface
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert

from config import MAX_GRAD_NORM, PAD_MULTIPLE, PRECISIONS
from qlora import fast, qat
from qlora.cli import UserError
from qlora.cpu.attach import usable
from qlora.cpu.tokens import whole_rows
from qlora.live_bytes import LiveBytes
from qlora.loading import never_repack, quantization_config
from qlora.logits import causal_lm, hidden_states, loss_at_labels
from qlora.lora import lora_config
from qlora.packed import METHODS as PACKED
from qlora.packed import pack_layers, packing_of
from qlora.shapes import skeleton
from qlora.weights import linear_layers

# Bytes that cuBLAS gets from torch's allocator (torch's CUDA notes): with compute capability 9, and before.
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
    qat: str | None = None
    gradient_checkpointing: bool = False
    packing: bool = False
    labels: int | None = 2  # labelled positions of a row; an answer has two, None: all (objective lm)
    capability: tuple[int, int] = (8, 0)  # compute capability of the GPU
    lane: str = "fp32"  # of a CPU

    lora_alpha: ClassVar[None] = None  # a factor: it takes no memory

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def cublas_workspace(self) -> int:
        return CUBLAS_WORKSPACE[self.capability >= (9, 0)] if self.on_gpu else 0

    @property
    def attention(self):
        """The attention that is planned with: what fast.make_fast() lets this device take."""
        if self.packing:
            return masked_attention
        if not self.on_gpu:
            return flash_attention  # torch's own on a CPU
        return flash_attention if fast.has_flash(self.capability, self.dtype) else efficient_attention

    def autocast(self):
        """A GPU's, as Hardware.autocast; the tensors without data say that they are a CPU's."""
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.on_gpu and self.dtype != torch.float32)


def predict_training(config, job: Job) -> dict:
    """Bytes at the peak of a training step, optimizer state included, by what they are for.

    weights: the frozen base as held; fast_copy: its dequantized values (CPU only), and those that --qat
    rounded; adapters, gradients, optimizer: LoRA's; activations: kept from forward to backward; logits: the
    loss's; temporaries: the rest.
    """
    return largest(training_phases(config, job))


def training_phases(config, job: Job) -> list[dict]:
    """The same at the peak of the forward pass with the loss, and at that of the rest of the step."""
    phases = []
    with planned(config, job) as (model, live):
        make_trainable(model, job, live)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_with_state(trained, live)
        live.tag = "activations"
        width = -(-job.length // PAD_MULTIPLE) * PAD_MULTIPLE
        ids = torch.empty(job.batch_size, width, dtype=torch.long)
        # A CPU's decoder keeps its buffers from one step to the next.
        for _ in range(2 if usable(causal_lm(model)) else 1):
            live.start_peak()
            with job.autocast():
                loss = model(input_ids=ids, labels=ids).loss
            phases = [parts_at_peak(live, job)]
            live.tag = "temporaries"
            live.start_peak()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            del loss
            phases.append(parts_at_peak(live, job))
            live.tag = "activations"
    return phases


def parts_at_peak(live: LiveBytes, job: Job) -> dict:
    parts = {kind: live.at_peak.get(kind, 0) for kind in KINDS}
    parts["temporaries"] += live.at_peak.get("workspace", 0) + job.cublas_workspace
    return {**parts, "peak": sum(parts.values())}


def largest(phases: list[dict]) -> dict:
    return max(phases, key=lambda parts: parts.get("peak", 0))


def predict_inference(config, job: Job) -> dict:
    """Bytes at the peak of reading `batch_size` prompts of `length` tokens, KV cache included."""
    with planned(config, job) as (model, live), torch.inference_mode():
        attend(causal_lm(model), job.attention)
        live.tag = "temporaries"
        live.start_peak()
        ids = torch.empty(job.batch_size, job.length, dtype=torch.long)
        with job.autocast():
            cached = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        if cached is None:
            reason = "it keeps no keys and values from one token to the next"
            raise UserError(f"a {config.model_type} model can't be planned: {reason}")
        both = [t for layer in cached.layers for t in (layer.keys, layer.values)]
        cache = sum(t.untyped_storage().nbytes() for t in both)
    held = {"weights": live.live["weights"], "adapters": live.live["adapters"], "kv_cache": cache}
    peak = live.peak + job.cublas_workspace
    return {**held, "temporaries": peak - sum(held.values()), "peak": peak}


def predict_merge(config, job: Job) -> dict:
    """Bytes of `qlora_inference.py --merge`: base and adapter as trained, and the 16-bit model besides."""
    sixteen, adapted = weights_bytes(config, Job(precision="bf16")), planned_model(config, job)
    adapters = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    return {"ram": weights_bytes(config, job) + adapters + sixteen, "disk": sixteen}


def weights_bytes(config, job: Job) -> int:
    """What the base alone holds, quantization constants and buffers included."""
    with planned(config, replace(job, device="cpu"), lora=False) as (_, live):
        return live.now


def predict(what, config, job: Job) -> dict:
    """`what` (one of the predictions) for all layers; if they are alike, extrapolated from 2 and 3 of them.

    If layers are alike, every figure of a phase is a straight line in their number; the parameter count is
    the check. Raises UserError for experts in a dtype in which torch can't compute them without data.
    """
    try:
        return _predict(what, config, job)
    except RuntimeError as error:  # torch._grouped_mm on tensors without data
        if "Expected inputs of BF16" not in str(error):
            raise
        kind = f"a {config.model_type} model's experts can't be planned in {job.dtype}"
        raise UserError(f"{kind}: add --precision bf16") from None


def _predict(what, config, job: Job) -> dict:
    def phases(config) -> list[dict]:
        return training_phases(config, job) if what is predict_training else [what(config, job)]

    layers = config.num_hidden_layers
    if layers <= 3 or not _alike(config.to_json_string(use_diff=False), type(config)):
        return largest(phases(config))
    two, three = (phases(first_layers(config, n)) for n in (2, 3))
    deeper = [{k: a[k] + (b[k] - a[k]) * (layers - 2) for k in a} for a, b in zip(two, three)]
    return largest(deeper)


@functools.cache
def _alike(config_json: str, kind: type) -> bool:
    config = kind(**json.loads(config_json))
    if len(set(getattr(config, "layer_types", None) or ())) > 1:  # sliding and full attention in turn, say
        return False
    two, three = (parameters(first_layers(config, n)) for n in (2, 3))
    return parameters(config) == two + (three - two) * (config.num_hidden_layers - 2)


def first_layers(config, layers: int):
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:layers]
    return shallow


def parameters(config) -> int:
    return planned_model(config, Job(precision="bf16"), lora=False).num_parameters()


def refuse_other_kinds(config) -> None:
    """Only a causal language model that attends as Llama does is planned; raises UserError for the rest."""
    reason = ""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "it is no causal language model"
    elif not hasattr(config, "num_attention_heads"):
        reason = "it has no attention"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "its attention caps its logits"
    if reason:
        raise UserError(f"a {config.model_type} model can't be planned: {reason}")


def planned_model(config, job: Job, lora: bool = True):
    """The model with its quantized and LoRA layers, on the meta device. Not to be called inside `no_data`."""
    dtype = PRECISIONS[job.precision]
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else job.dtype
    quantization = quantization_config(job.precision, dtype)
    if lora and job.lora_variant == "dora" and quantization:
        raise UserError(
            "DoRA on quantized weights can't be planned: PEFT reads the weights, and a plan has none"
        )
    model = skeleton(config, dtype)
    with torch.device("meta"):
        if job.precision in PACKED:
            packing = packing_of(getattr(config, "quantization_config", None), config.model_type)
            if packing is None:
                raise UserError(f"{config.model_type}: no {job.precision} in its config, so no plan of it")
            pack_layers(model, {name for name, _ in linear_layers(model)}, packing)
        if quantization:
            replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)
            model.is_loaded_in_4bit = quantization.load_in_4bit
            model.is_loaded_in_8bit = quantization.load_in_8bit
        if not lora:
            return model
        model = get_peft_model(model, qat.register(lora_config(model, job), job.qat))
        qat.use_grid(model, "default", job.qat)
        return model


@contextmanager
def planned(config, job: Job, lora: bool = True) -> Iterator[tuple]:
    """(the model with tensors that hold no data, the LiveBytes that counts them and what follows)"""
    model = planned_model(config, job, lora)
    live = LiveBytes(CUDA_BLOCK, cuda_workspace) if job.on_gpu else LiveBytes()
    with no_data(job.on_gpu), live:
        fill(model, live)
        yield model, live


@contextmanager
def no_data(gpu: bool) -> Iterator[None]:
    """FakeTensorMode in which tensors that libraries keep for later are not mistaken for real ones.

    All tensors say that they are a CPU's, since this torch may know no CUDA device; with `gpu`, bitsandbytes
    computes with them as it does on a GPU.
    """
    if "dynamic" not in functional.name2qmap:  # bitsandbytes' own cache: filled now, with real values
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()
    gc.freeze()  # the libraries' million objects need not be searched again and again: a fifth faster
    cpu_int8 = products.MatMul8bitFp  # on a CPU, bitsandbytes trains int8 layers in floating point
    if gpu:
        products.MatMul8bitFp = products.MatMul8bitLt
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        products.MatMul8bitFp = cpu_int8
        gc.unfreeze()


def make_trainable(model, job: Job, live: LiveBytes) -> None:
    """Attention, decoder and loss as a training run has them."""
    lm = causal_lm(model)
    attend(lm, job.attention)
    if job.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    live.tag = "fast_copy"
    if not job.on_gpu:
        fast.use_cpu(model, lm, job.lane)
    for _, layer in qat.grid_layers(model):  # their rounded weights stay from one step to the next
        layer.rounded("default", job.dtype if job.on_gpu else lm.dtype)

    def labelled(lm, input_ids, labels, **kwargs):
        """As many positions as there will be labels; from here on it is the loss that holds memory."""
        count = input_ids.shape[1] - 1
        count = count if job.labels is None else min(job.labels, count)
        if decoder := usable(lm):
            states = decoder.states(whole_rows(input_ids, count))
        else:
            states = hidden_states(lm, input_ids, use_cache=False, **kwargs).last_hidden_state
            states = states[:, :count].reshape(-1, states.shape[-1])
        live.tag = "logits"
        return states.clone(), labels[:, :count].reshape(-1).clone()

    loss_at_labels(lm, labelled)
    model.train()


def optimizer_with_state(trained: list, live: LiveBytes) -> torch.optim.Optimizer:
    """The Trainer's default AdamW after a first update; gradients made from now on are counted as such."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    live.tag = "optimizer"
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: live.retag(p.grad, "gradients"))
    return optimizer


def fill(model, live: LiveBytes | None = None, device: str = "cpu") -> None:
    """Give a skeleton its tensors, quantized as load_base does it; without data inside `no_data`."""
    empty = functools.partial(torch.empty, device=device)
    made: dict = {}  # tied weights stay tied
    dtype = causal_lm(model).dtype
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if live:
                live.tag = "adapters" if old.requires_grad else "weights"
            if id(old) not in made:
                made[id(old)] = _filled(module, old, dtype, empty)
            module._parameters[name] = made[id(old)]
        for name, old in list(module.named_buffers(recurse=False)):
            module._buffers[name] = empty(old.shape, dtype=old.dtype)
    never_repack(model)


def _filled(module, old, dtype: torch.dtype, empty) -> torch.nn.Parameter:
    """`old` with a tensor, and with what bitsandbytes keeps beside a quantized one."""
    if hasattr(old, "quant_type"):
        how = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type")}
        packed, state = functional.quantize_4bit(empty(old.shape, dtype=dtype), **how)
        weight = torch.nn.Parameter(packed, requires_grad=False)
        module.quant_state = state
        vars(weight).update(how, quant_state=state)  # PEFT reads them
    elif hasattr(old, "SCB"):
        weight = torch.nn.Parameter(empty(old.shape, dtype=torch.int8), requires_grad=False)
        weight.CB, weight.SCB = weight.data, empty(len(old))
        module.state.threshold = 0.0  # which columns are outliers depends on the data; they are few
    else:
        weight = torch.nn.Parameter(empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
    return weight


def attend(model, attention) -> None:
    """Let `model` attend by this function and make no mask.

    transformers would look whether rows are packed, and tensors without data can't answer.
    """
    name = "planned"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)


def flash_attention(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What FlashAttention keeps: q, k, v, its output and one number a row; grouped heads are not repeated.

    The CPU's operator has the same shapes, and this torch may know no CUDA device.
    """
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


# torch 2.6 and 2.7 give the gradients of k and v as many heads as q has, which autograd refuses.
@register_op_impl(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_gradients(fake_mode, function, out_gradient, q, k, v, *args, **kwargs):
    with in_kernel_invocation_manager(fake_mode):
        made = [torch.empty_like(x, device="meta") for x in (q, k, v)]
    return tuple(fake_mode.fake_tensor_converter.from_meta_and_device(fake_mode, x, q.device) for x in made)


def efficient_attention(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What torch's memory-efficient kernel keeps: the same, but keys and values once for each head of q."""
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=1) if heads > 1 else x for x in (k, v))
    attend_to = torch.ops.aten._scaled_dot_product_efficient_attention
    out = attend_to(q, k, v, None, q.requires_grad, dropout, q.shape[2] > 1, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def masked_attention(module, q, k, v, attention_mask, **kwargs):
    """torch's memory-efficient kernel with a mask, as packed rows need it; each layer keeps its own."""
    rows, heads, tokens, _ = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    bias = q.new_empty(rows, 1, tokens, tokens).expand(-1, heads, -1, -1)
    attend_to = torch.ops.aten._scaled_dot_product_efficient_attention
    out = attend_to(q, k, v, bias, q.requires_grad, 0.0, False, scale=kwargs.get("scaling"))[0]
    return out.transpose(1, 2).contiguous(), None


def cuda_workspace(function, args, out) -> int:
    """Bytes that CUDA kernels allocate inside, as their sources say (bitsandbytes 0.50.2, torch 2.13)."""
    name = function.name()
    if name == "bitsandbytes::gemm_4bit":  # long inputs: dequantize, then multiply
        rows, columns = args[2]
        return rows * columns * args[0].element_size()
    if name == "bitsandbytes::int8_scaled_mm":  # sums in int32, scaled into the output afterwards
        return out.numel() * 4
    if "efficient_attention" in name and "backward" in name:
        # dq is summed in fp32; the product of the output and its gradient is one number a row
        q, out_gradient = args[1], args[0]
        return q.numel() * 4 + out_gradient.numel() // out_gradient.shape[-1] * 4
    if "flash_attention" in name and "backward" in name:
        # dq is summed in fp32; dk and dv are made for every head, then summed by group
        q, k = args[1], args[2]
        grouped = k.shape[1] != q.shape[1]
        return q.numel() * 4 + (2 * q.numel() * q.element_size() if grouped else 0)
    return 0
