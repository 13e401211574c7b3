"""kernels.cpp in torch: slower, for machines without a compiler, and what tests compare the kernels with."""

import torch


def rms_norm(x, add, weight, eps, total, y, scale) -> None:
    if add is not None:
        x = torch.add(x, add, out=total)
    torch.rsqrt(x.square().mean(-1).add_(eps), out=scale)
    torch.mul(x, scale[:, None], out=y).mul_(weight)


def rms_backward(dy, total, weight, scale, residual, out) -> None:
    d = dy * weight
    along = (d * total).mean(-1, keepdim=True) * scale[:, None] ** 3
    out.copy_(residual).add_(d.mul_(scale[:, None])).sub_(total * along)


def gate_up(both, y) -> None:
    gate, up = both.chunk(2, -1)
    torch.mul(torch.nn.functional.silu(gate), up, out=y)


def gate_up_backward(dy, both, dboth) -> None:
    (gate, up), (dgate, dup) = both.chunk(2, -1), dboth.chunk(2, -1)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    torch.mul(torch.nn.functional.silu(gate), dy, out=dup)


def rotate_in(qkv, place, cosine, sine, q, k, v, per) -> None:
    rows, length = place.shape
    d, groups = k.shape[-1], k.shape[0] // rows
    there = qkv[place.clamp(min=0).long()] * (place >= 0)[..., None]
    flat_q, flat_k, flat_v = there.split([groups * per * d, groups * d, groups * d], -1)
    turned = _turn(flat_q.view(rows, length, groups, per, d), cosine, sine)
    q.view(rows, groups, length, per, d).copy_(turned.transpose(1, 2))
    turned = _turn(flat_k.view(rows, length, groups, 1, d), cosine, sine)
    k.view(rows, groups, length, 1, d).copy_(turned.transpose(1, 2))
    v.view(rows, groups, length, d).copy_(flat_v.view(rows, length, groups, d).transpose(1, 2))


def rotate_back(dq, dk, dv, place, owner, cosine, sine, dqkv, shared, per) -> None:
    rows, length = place.shape
    d, groups = dk.shape[-1], dk.shape[0] // rows
    parts = []
    for part, heads, sine_ in ((dq, per, -sine), (dk, 1, -sine), (dv, 1, None)):
        part = part.view(rows, groups, length, heads, d).transpose(1, 2)
        part = part if sine_ is None else _turn(part, cosine, sine_)
        parts.append(part.reshape(rows * length, -1))
    places = place.flatten().long()
    there = places >= 0
    dqkv.zero_().index_add_(0, places[there], torch.cat(parts, -1)[there])


def heads_to_flat(heads, owner, flat, length) -> None:
    groups = flat.shape[1] // (heads.shape[1] // length * heads.shape[2])
    by_position = heads.view(-1, groups, length, flat.shape[1] // groups).transpose(1, 2)
    chosen = by_position.reshape(-1, flat.shape[1])[owner.clamp(min=0).long()]
    torch.mul(chosen, (owner >= 0)[:, None], out=flat)


def flat_to_heads(flat, place, owner, heads) -> None:
    rows, length = place.shape
    groups = heads.shape[0] // rows
    by_position = flat.new_zeros(rows * length, flat.shape[1])
    own = owner >= 0
    by_position[owner[own].long()] = flat[own]
    by_group = by_position.view(rows, length, groups, -1).transpose(1, 2)
    heads.view(rows, groups, length, -1).copy_(by_group)


def softmax(scores, scale, logsum, per, first) -> None:
    scores.mul_(scale).masked_fill_(_ahead(scores, per, first), float("-inf"))
    logsum.copy_(scores.logsumexp(-1))
    scores.sub_(logsum[..., None]).exp_()


def softmax_backward(scores, dp, scale, logsum, per, first) -> None:
    scores.mul_(scale).sub_(logsum[..., None]).exp_().masked_fill_(_ahead(scores, per, first), 0.0)
    along = (scores * dp).sum(-1, keepdim=True)
    dp.sub_(along).mul_(scores).mul_(scale)


def _turn(x, cosine, sine):
    """x (rows, length, groups, heads, d), turned by position."""
    length, half = x.shape[1], x.shape[-1] // 2
    c, s = (t[:length, None, None] for t in (cosine, sine))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def _ahead(scores, per: int, first: int):
    """Where a query would look ahead: (queries * per, keys)."""
    seen = torch.arange(scores.shape[1])[:, None] // per + first
    return torch.arange(scores.shape[2]) > seen
