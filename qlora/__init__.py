"""The core: what more than one script needs. Its rooms: training/, lab/, memory/, playground/."""

import logging
import os

# Read once, when torch is imported: huge pages halve the page faults of a training step on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Messages that mean nothing to the reader. bitsandbytes: a CPU kernel could be fetched from the hub (not
# wanted, see loading.never_repack), and LLM.int8 computes in fp16. torchao: its CUDA extensions do not load
# on a CPU.
CHATTY = "bitsandbytes.backends.cpu.ops bitsandbytes.autograd._functions torchao torch.utils._pytree"
for chatty in CHATTY.split():
    logging.getLogger(chatty).setLevel(logging.ERROR)
