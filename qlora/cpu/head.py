"""Cross-entropy through a frozen head, a few positions at a time, its gradient made along the way."""

import torch

from qlora.cpu import kernels

POSITIONS = 256  # whose logits exist at once: 256 x 49152 in fp32 are 50 MB


class HeadLoss(torch.autograd.Function):
    """-log P(target) (positions,) of hidden (positions, width), targets (positions,).

    A position's gradient is known up to a factor as soon as its logits are there: they need not be kept or
    made again (as Liger Kernel's fused linear cross entropy does on GPUs).
    """

    @staticmethod
    def forward(ctx, hidden, targets, weight):
        losses = hidden.new_empty(len(hidden))
        gradient = torch.empty_like(hidden)
        if not len(hidden):  # a batch that only fills up what several processes read
            ctx.save_for_backward(gradient)
            return losses
        for h, t, d, out in zip(*(x.split(POSITIONS) for x in (hidden, targets, gradient, losses))):
            p = (h.to(weight.dtype) @ weight.t()).float()  # logits first, then made probabilities in place
            of_targets, sums = p.gather(1, t[:, None]), torch.empty(1, len(t))
            # Attention's softmax: each row is a query that sees every key.
            kernels.load()[0].softmax(p[None], 1.0, sums, len(t), p.shape[1] - 1)
            torch.sub(sums[0], of_targets[:, 0], out=out)
            p.scatter_add_(1, t[:, None], torch.full_like(of_targets, -1.0))
            d.copy_(p.to(weight.dtype) @ weight)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        return ctx.saved_tensors[0] * dlosses[:, None], None, None
