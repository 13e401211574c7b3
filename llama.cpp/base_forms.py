"""The base alone in each form that is deployed: what rounding does to it is not the adapter's loss."""

from pathlib import Path

import numpy as np

from gguf_export import convert, execute, importance_matrix
from llama_server import ask_labels
from qlora.adapters import Adapter
from qlora.cli import UserError, note
from reference import Questions
from settings import BIN


class BaseForms:
    """Makes the base's files in `aside`, one at a time; each form is made and asked once.

    `aside`/base is the base's folder: the values that were trained on, in 16 bits.
    """

    def __init__(self, adapter: Adapter, questions: Questions, aside: Path):
        self.adapter, self.questions, self.aside = adapter, questions, aside
        self.known: dict[tuple, np.ndarray | None] = {}
        self.matrix: Path | None = None

    def odds(self, variant) -> np.ndarray | None:
        """Log-odds of the first rows; None, with a note, where the form is unknown or can't be made."""
        key = (variant.type, variant.matrix_of, variant.facts["kind"] == "lora" and variant.files[0])
        if key not in self.known:
            try:
                self.known[key] = self.ask(variant)
            except UserError as error:
                note(f"note       {variant.name}: no base in this form, so no survival ({error})")
                self.known[key] = None
        return self.known[key]

    def ask(self, variant) -> np.ndarray:
        if variant.facts["kind"] == "lora":
            return ask_labels("base alone", variant.files[0], self.questions)
        if variant.type == "unknown":
            raise UserError("the file does not say its type")
        f16 = self.aside / "base-f16.gguf"
        if not f16.exists():
            convert(self.aside / "base", f16)
        if variant.type == "f16":
            return ask_labels("base in f16", f16, self.questions)
        file = self.aside / "base.gguf"
        options = []
        # The file's own matrix is not kept: it is made again, of the same prompts. A given file's is unknown.
        if variant.matrix_of:
            self.matrix = self.matrix or importance_matrix(self.adapter, variant.matrix_of, self.aside)
            options = ["--imatrix", self.matrix]
        execute(BIN / "llama-quantize", *options, f16, file, variant.type)
        return ask_labels(f"base in {variant.name}", file, self.questions)
