"""Cross-entropy through a frozen head, a few positions at a time, its gradient made along the way."""

import torch

POSITIONS = 256  # whose logits exist at once: 256 x 49152 in fp32 are 50 MB


class HeadLoss(torch.autograd.Function):
    """Sum of -log P(target); hidden (positions, width), targets (positions,), weight (vocabulary, width).

    The loss is a sum, so its gradient is known up to a factor as soon as the logits are there: they need not
    be kept or made again (as Liger Kernel's fused linear cross entropy does on GPUs).
    """

    @staticmethod
    def forward(ctx, hidden, targets, weight):
        total = hidden.new_zeros(())
        gradient = torch.empty_like(hidden)
        for h, t, d in zip(*(x.split(POSITIONS) for x in (hidden, targets, gradient))):
            h, t = h.to(weight.dtype), t[:, None]
            logits = (h @ weight.t()).float()
            sums = logits.logsumexp(-1, keepdim=True)
            total += (sums - logits.gather(1, t)).sum()
            p = logits.sub_(sums).exp_()
            p.scatter_add_(1, t, -torch.ones_like(t, dtype=p.dtype))
            d.copy_(p.to(weight.dtype) @ weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, dtotal):
        return ctx.saved_tensors[0] * dtotal, None, None
