"""The layers of a Llama-like model, from embeddings to the last hidden states, as one autograd function.

Written out forward and backward (the mathematics of transformers' modeling_llama.py): tokens lie end to end,
buffers are made once, norms, rotary embedding, softmax and gates are one pass each, and what is cheap to make
again (norms' and gates' outputs, attention's probabilities) is not kept. Of the last layer only the wanted
positions go through o_proj and the MLP.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlora.cpu import kernels
from qlora.cpu.attention import Attention
from qlora.cpu.lanes import group_of
from qlora.cpu.products import Group, HalfGroup, Lora, Pool
from qlora.cpu.tokens import FlatRows, flatten

# Which linear layers read the same input: (of which block, their names).
GROUPS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}


class Layer:
    """One decoder layer: its two norms' weights in fp32 and its four groups of products."""

    def __init__(self, layer, lane: str):
        self.norm = layer.input_layernorm.weight.detach().float()
        self.mlp_norm = layer.post_attention_layernorm.weight.detach().float()
        self.modules = {
            name: [getattr(getattr(layer, block), each) for each in names]
            for name, (block, names) in GROUPS.items()
        }
        self.groups: dict[str, Group] = {}
        for name, modules in self.modules.items():
            layers, rank = [base_layer(m) for m in modules], sum(largest_rank(m) for m in modules)
            self.groups[name] = group_of(layers, lane, rank)
        self.qkv, self.o, self.gate_up, self.down = self.groups.values()

    def dense(self) -> Iterator[tuple[torch.Tensor, torch.nn.Linear]]:
        """Each linear layer's values (out, in) as they are multiplied with, and the layer."""
        for name, group in self.groups.items():
            if not isinstance(group, HalfGroup):
                yield from zip(group.frozen()[0].split(group.outs), map(base_layer, self.modules[name]))


@dataclass
class Kept:
    """What a layer's backward pass needs: the two sums that norms read, q, k, v, …"""

    x: torch.Tensor
    scale: torch.Tensor
    low_qkv: torch.Tensor
    attended: tuple
    heads: torch.Tensor
    low_o: torch.Tensor
    middle: torch.Tensor
    mlp_scale: torch.Tensor
    gate_up: torch.Tensor
    low_gate_up: torch.Tensor
    low_down: torch.Tensor


class Decoder:
    """hidden = decoder(input_ids, wanted): hidden states in fp32, after the last norm.

    `lane`: how products are computed. The frozen values are copied once; LoRA's are read at each call, from
    the adapter that is switched on.
    """

    def __init__(self, lm, lane: str):
        c, model = lm.config, lm.model
        self.lm, self.eps = lm, c.rms_norm_eps
        self.width, self.between = c.hidden_size, c.intermediate_size
        self.d = getattr(c, "head_dim", None) or self.width // c.num_attention_heads
        self.kernels, self.how = kernels.load()
        self.attention = Attention(self.kernels, c.num_attention_heads, c.num_key_value_heads, self.d)
        self.embedding, self.norm, self.rotary = lm.get_input_embeddings(), model.norm, model.rotary_emb
        self.layers = [Layer(layer, lane) for layer in model.layers]
        self.cosine = self.sine = torch.empty(0, 0)
        self.free: list[Pool] = []  # buffers whose backward pass is done
        self.scratch = Pool()  # of passes that nothing is kept from
        self.parameters: list[torch.nn.Parameter] = []  # A and B of the adapter that is switched on
        self._there: list[torch.Tensor] = []  # where they are copied to
        self._scaled: list[tuple[torch.Tensor, float]] = []
        self._taken: list | None = None  # which matrices and scalings these are

    def __call__(self, input_ids, wanted, position_ids=None) -> torch.Tensor:
        """input_ids and a mask, both (rows, tokens) -> hidden states (wanted positions, width).

        `position_ids` of packed rows begin at 0 with each example.
        """
        return self.states(flatten(input_ids, wanted, position_ids))

    def states(self, rows: FlatRows) -> torch.Tensor:
        self._read_adapter()
        self._read_angles(rows.length)
        x = F.embedding(rows.ids, self.embedding.weight).float()
        if torch.is_grad_enabled() and self.parameters:
            self.scratch = Pool()
            hidden = Function.apply(x, self, rows, *self.parameters)
        else:
            hidden = self.forward(x, rows, self.scratch, None)
        return F.rms_norm(hidden, (self.width,), self.norm.weight.float(), self.eps)

    def frozen(self) -> list[torch.Tensor]:
        """All that is multiplied with and must not change."""
        return [copy for layer in self.layers for group in layer.groups.values() for copy in group.frozen()]

    def _read_adapter(self) -> None:
        """Copy the values of the adapter that is switched on; none: LoRA adds nothing."""
        name = active_adapter(self.lm)
        lora = [
            [lora_of(m, name) for m in group] for layer in self.layers for group in layer.modules.values()
        ]
        ones = [one for group in lora for one in group if one]
        parameters, taken = [p for one in ones for p in (one.a, one.b)], [one.key for one in ones]
        if taken != self._taken:
            groups = [group for layer in self.layers for group in layer.groups.values()]
            self._there = [copy for group, its in zip(groups, lora) for copy in group.take(its)]
            self._scaled = [(part[2], part[3]) for group in groups for part in group.parts]
            self.parameters, self._taken = parameters, taken
        if parameters:
            torch._foreach_copy_(self._there, [p.detach() for p in parameters])
            for scaling in {s for _, s in self._scaled} - {1.0}:
                torch._foreach_mul_([b for b, s in self._scaled if s == scaling], scaling)

    def _read_angles(self, length: int) -> None:
        """Tables (positions, d / 2) of the model's own rotary embedding."""
        if len(self.cosine) < length:
            positions = torch.arange(max(length, 256))[None]
            tables = self.rotary(torch.zeros(1), positions)
            self.cosine, self.sine = (t[0, :, : self.d // 2].float().contiguous() for t in tables)

    def forward(self, x, rows: FlatRows, pool: Pool, kept: list | None) -> torch.Tensor:
        """x (tokens, width) -> (wanted positions, width); `kept` collects what is kept of each layer."""
        k, add, angles = self.kernels, None, (self.cosine, self.sine)
        for i, layer in enumerate(self.layers):
            at = 0 if kept is None else i  # layers share their buffers where nothing is kept

            def own(name, *shape, at=at):
                return pool((name, at), *shape)

            tokens = len(x)
            total = x if add is None else own("x", tokens, self.width)
            scale, normed = own("scale", tokens), pool("normed", tokens, self.width)
            k.rms_norm(x, add, layer.norm, self.eps, None if add is None else total, normed, scale)
            qkv, low_qkv = layer.qkv.up(normed, pool, "qkv", ("low_qkv", at))
            attended, heads = self.attention.forward(qkv, rows, angles, pool, own)
            residual = total
            if layer is self.layers[-1]:
                heads, residual = heads[rows.wanted], residual[rows.wanted]
                tokens = len(heads)
            y, low_o = layer.o.up(heads, pool, "y", ("low_o", at))
            middle, mlp_scale = own("middle", tokens, self.width), own("mlp_scale", tokens)
            normed = pool("normed", tokens, self.width)
            k.rms_norm(residual, y, layer.mlp_norm, self.eps, middle, normed, mlp_scale)
            both, low_gate_up = layer.gate_up.up(normed, pool, ("gate_up", at), ("low_gate_up", at))
            gated = pool("gated", tokens, self.between)
            k.gate_up(both, gated)
            add, low_down = layer.down.up(gated, pool, "y", ("low_down", at))
            if kept is not None:
                first = total, scale, low_qkv, attended, heads, low_o
                kept.append(Kept(*first, middle, mlp_scale, both, low_gate_up, low_down))
            x = middle
        return x + add

    def backward(self, dout, rows: FlatRows, pool: Pool, kept: list[Kept]) -> list:
        """Gradients of A and B, in the order of `parameters`."""
        k, every, last = self.kernels, [], len(kept) - 1
        angles = self.cosine, self.sine
        d = self.layers[-1].down.gradient_buffer(pool, "d_last", len(dout)).copy_(dout)
        for i in range(last, -1, -1):
            layer, e, tokens = self.layers[i], kept[i], len(kept[i].middle)
            gated = pool("gated", tokens, self.between)
            k.gate_up(e.gate_up, gated)
            dgated, g_down = layer.down.down(d, gated, e.low_down, pool, "dgated")
            dboth = layer.gate_up.gradient_buffer(pool, "dboth", tokens)
            k.gate_up_backward(dgated, e.gate_up, dboth)
            normed = pool("normed", tokens, self.width)
            k.rms_norm(e.middle, None, layer.mlp_norm, self.eps, None, normed, e.mlp_scale)
            dnormed, g_gate_up = layer.gate_up.down(dboth, normed, e.low_gate_up, pool, "dnormed")
            dmiddle = layer.o.gradient_buffer(pool, "dmiddle", tokens)
            k.rms_backward(dnormed, e.middle, layer.mlp_norm, e.mlp_scale, d, dmiddle)
            dheads, g_o = layer.o.down(dmiddle, e.heads, e.low_o, pool, "dheads")
            if i == last:  # from the wanted positions to all
                tokens = len(rows.ids)
                dheads, dmiddle = (
                    pool(f"{name}_all", tokens, part.shape[1]).zero_().index_add_(0, rows.wanted, part)
                    for name, part in (("dheads", dheads), ("dmiddle", dmiddle))
                )
            dqkv = layer.qkv.gradient_buffer(pool, "dqkv", tokens)
            self.attention.backward(dheads, e.attended, rows, angles, pool, dqkv)
            normed = pool("normed", tokens, self.width)
            k.rms_norm(e.x, None, layer.norm, self.eps, None, normed, e.scale)
            dnormed, g_qkv = layer.qkv.down(dqkv, normed, e.low_qkv, pool, "dnormed" if i else None)
            every.append(g_qkv + g_o + g_gate_up + g_down)
            if i:
                d = self.layers[i - 1].down.gradient_buffer(pool, "d", tokens)
                k.rms_backward(dnormed, e.x, layer.norm, e.scale, dmiddle, d)
        return [gradient for gradients in reversed(every) for gradient in gradients]


class Function(torch.autograd.Function):
    """The decoder as autograd sees it: x (tokens, width) and all A and B -> hidden states."""

    @staticmethod
    def forward(ctx, x, decoder: Decoder, rows: FlatRows, *parameters):
        ctx.pool = decoder.free.pop() if decoder.free else Pool()
        ctx.decoder, ctx.rows, ctx.kept = decoder, rows, []
        return decoder.forward(x, rows, ctx.pool, ctx.kept)

    @staticmethod
    def backward(ctx, dout):
        if ctx.kept is None:
            raise RuntimeError("what the backward pass needs is gone: it can run once for each forward pass")
        gradients = ctx.decoder.backward(dout, ctx.rows, ctx.pool, ctx.kept)
        ctx.decoder.free.append(ctx.pool)  # a later step writes into the same buffers
        ctx.pool = ctx.kept = None
        return None, None, None, *gradients


def base_layer(module) -> torch.nn.Linear:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def largest_rank(module) -> int:
    """Of a linear layer's adapters, switched on or not; 0 without LoRA."""
    return max(getattr(module, "r", {0: 0}).values(), default=0)


def active_adapter(lm) -> str | None:
    """Name of the adapter that is switched on; None: LoRA adds nothing."""
    for module in lm.modules():
        if hasattr(module, "lora_A") and not module.disable_adapters and module.active_adapters:
            return module.active_adapters[0]
    return None


def lora_of(module, name: str | None) -> Lora | None:
    if name is None or name not in getattr(module, "lora_A", {}):
        return None
    return Lora(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
