"""A museum of bugs: each is planted in a small fine-tuning, and caught by a guard of this project.

python -m museum               # what there is
python -m museum end-masked    # plant one: what one sees, what catches it, cause and fix
"""

import sys

from config import ROOT

sys.path.append(str(ROOT / "llama.cpp"))  # the parity ladder's verdicts are guards as well
