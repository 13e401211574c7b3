"""What more than one of the three scripts needs; each file holds one idea."""

import os

# Read once, when torch is imported: huge pages for large tensors halve the page faults of a training step on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
