"""The museum's flags; the comment above each is its --help text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from config import BUNDLED, Positional


@dataclass
class MuseumSettings:
    # Which bug to plant. Without it: the list of them.
    bug: Positional[Optional[str]] = None
    # All of them, one after the other.
    all: bool = False
    # --all or one bug: also keep what was measured in this file, in place of the bug's earlier record.
    json: Optional[Path] = None
    # From 1 to 12: plant one of ten bugs, or none, show nothing but the run's symptoms, and leave the run in
    # --output-dir.
    riddle: Optional[int] = None
    # --riddle K: your answer, the name of a bug, or "healthy". Says whether it is right.
    answer: Optional[str] = None
    # Where riddles leave their runs.
    output_dir: Path = Path("museum-run")
    # What is fine-tuned: a preset or a folder. Some bugs need a random model of two layers, and make one.
    model: str = BUNDLED
