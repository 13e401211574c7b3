"""The frozen base shared out among GPUs, for models that one card can't hold (FSDP).

Only the decoder layers are sharded: they hold most of the weights, and embeddings and head would be gathered
for the whole step anyway. The adapters, about a hundredth of the weights, stay whole on each GPU, and DDP
keeps them equal. So checkpoints, resume, guards and the saved adapter are those of any other run.
"""

import torch

from qlora import processes
from qlora.cli import note, require
from qlora.logits import causal_lm


def shard_base(model, device: str) -> None:
    """Move a PEFT model from the CPU to `device`, each process keeping its part of every decoder layer.

    From here on the processes have to make the same forward passes: each one gathers a layer's weights
    (torch.distributed.fsdp.fully_shard). Raises UsageError where a layer's weights have several dtypes.
    """
    whole = sum(p.nbytes for p in model.parameters())
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = getattr(causal_lm(model), causal_lm(model).base_model_prefix)
    mesh = init_device_mesh(torch.device(device).type, (processes.count(),))
    for layer in decoder.layers:
        frozen = {p.dtype for p in layer.parameters() if not p.requires_grad}
        require(len(frozen) == 1, "FSDP needs one dtype in all weights of a layer: use nf4, bf16 or fp16")
        layer.to(device)
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
    model.to(device)
    # The root gathers nothing; it lets a layer's weights come while the layer before is computed.
    sharded = {p for layer in decoder.layers for p in layer.parameters() if not p.requires_grad}
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - sharded)
    causal_lm(model).hf_device_map = {"": torch.device(device).index or 0} if device != "cpu" else {"": "cpu"}
    own = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
    note(f"sharded    {own / 1e6:.1f} of {whole / 1e6:.1f} MB of weights on each of {processes.count()} GPUs")
    # What DDP does not have to keep equal, and can't: parts of weights.
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen
