"""What more than one of the three scripts needs; each file holds one idea."""

import logging
import os

# Read once, when torch is imported: huge pages for large tensors halve the page faults of a training step on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# bitsandbytes when it is imported: a CPU kernel could be fetched from the hub (not wanted, see loading.never_repack). bitsandbytes
# at each product: LLM.int8 computes in fp16. torchao, where it is installed: its CUDA extensions do not load on a CPU, …
for chatty in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "torchao", "torch.utils._pytree"):
    logging.getLogger(chatty).setLevel(logging.ERROR)
