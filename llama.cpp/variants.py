"""The GGUF files that are measured, and their rows of the ladder."""

from dataclasses import dataclass, field
from pathlib import Path

import gguf_files as gf
from base_forms import BaseForms
from gguf_export import make, unfit_for_lora_file
from ladder import OTHER_WEIGHTS, Replies, bound, result
from llama_server import ask_server
from qlora.adapters import WEIGHTS, Adapter
from qlora.cli import UserError, note, require
from qlora.files import sha256_of
from reference import Questions
from settings import ExportSettings, ParitySettings


@dataclass
class Variant:
    """A merged file, or a base with its LoRA file."""

    name: str
    type: str  # as llama-quantize names it
    files: list[Path]
    facts: dict = field(default_factory=dict)  # for its row, from the files themselves
    vocabulary: int = 0
    matrix_of: Path | None = None  # the f16 file whose importance matrix it was quantized with

    def __post_init__(self):
        kind = "lora" if len(self.files) == 2 else "merged"
        self.facts = {"kind": kind, "files": [file.name for file in self.files]}

    def broken(self, error: UserError) -> dict:
        """The row of a file that can't be asked: it is broken, and the ladder goes on."""
        note(f"{self.name:14} broken: {error}")
        return {"name": self.name, **self.facts, "broken": [str(error)], "cause": None}


def given(spec: str) -> Variant:
    """FILE.gguf or BASE.gguf+LORA.gguf, as --gguf names them."""
    files = [Path(spec)] if Path(spec).is_file() else [Path(name) for name in spec.split("+")]
    require(len(files) <= 2, f"--gguf {spec}: one file, or BASE.gguf+LORA.gguf")
    for file in files:
        require(file.is_file(), f"--gguf {file}: no such file")
    return Variant("+".join(file.stem for file in files), "", files)


def exported(s: ParitySettings, adapter: Adapter) -> list[Variant]:
    """The adapter's files in --output-dir; those that are missing are exported first."""

    def find(**wanted) -> Path | None:
        own = gf.own_files(s.output_dir, adapter)
        fits = [s.output_dir / name for name, what in own.items() if wanted.items() <= what.items()]
        return fits[0] if fits else None

    def export(**options) -> None:
        # What is lost is measured here, not refused.
        make(
            ExportSettings(s.adapter, output_dir=s.output_dir, force=True, **options),
            replace_modelfile=False,
        )

    variants = []
    few_bits = tuple(filter(gf.under_five_bits, s.types)) if s.imatrix else ()
    for types, imatrix in ((s.types, False), (few_bits, True)):
        wanted = {kind: {"kind": "merged", "type": kind, "imatrix": imatrix} for kind in types}
        if missing := tuple(kind for kind, what in wanted.items() if not find(**what)):
            export(types=missing, imatrix=imatrix)
        f16 = find(kind="merged", type="f16", imatrix=False) if imatrix else None
        name = "{} imatrix" if imatrix else "{}"
        for kind, what in wanted.items():
            variants.append(Variant(name.format(kind), kind, [find(**what)], matrix_of=f16))
    if unfit := unfit_for_lora_file(adapter):
        note(f"note       no base + LoRA: {unfit}")
        return variants
    if not find(kind="lora"):
        export(lora=True)
    return [*variants, Variant("base + LoRA", "", [find(kind="base"), find(kind="lora")])]


def fault(variant: Variant, adapter: Adapter) -> dict | None:
    """The row of a file that can't be asked; None if nothing is wrong with it."""
    first, *lora = variant.files
    try:
        model = gf.read_gguf(first)
        if lora:
            gf.check_pair(model, gf.read_gguf(lora[0]), lora[0].name, adapter.folder / WEIGHTS)
            if gf.known_files(first.parent).get(first.name, {}).get("kind") == "merged":
                raise UserError(
                    f"{first.name} has its adapter in it: it would be applied twice; give the base"
                )
        elif gf.is_lora(model):
            raise UserError(f"{first.name} is a LoRA file; give it with its base: BASE.gguf+{first.name}")
        if "tokenizer.ggml.tokens" not in model.fields:
            raise UserError(f"{first.name} has no tokenizer in it; it can't be asked anything")
    except UserError as error:
        return variant.broken(error)
    size, bits = gf.size_of(model, *variant.files)
    variant.facts |= {"bytes": size, "bits_per_weight": bits}
    variant.vocabulary = len(model.fields["tokenizer.ggml.tokens"].data)
    variant.type = variant.type or gf.file_type(model)


def measure(
    variant: Variant, adapter: Adapter, trained: Replies, questions: Questions, forms: BaseForms
) -> dict:
    """The variant's row: it is asked through llama-server and compared with the trained model."""
    base, kind = variant.files[0], variant.facts["kind"]
    try:
        if variant.vocabulary > len(trained.next[0]):
            raise UserError(f"{base.name} is another model: it has a larger vocabulary than was trained")
        replies = ask_server(variant.name, variant.files, questions)
        replies.base = forms.odds(variant)
    except UserError as error:
        return variant.broken(error)
    # A pair is what was trained if its base holds the very weights that the adapter was trained on.
    plain = kind == "lora" and adapter.base.precision in ("bf16", "fp16", "fp32")
    same = plain and adapter.revision == f"gguf-sha256:{sha256_of(base)}"
    wanted = bound(kind, variant.type, same, adapter.qat)
    row = result(variant.name, replies, trained, questions, wanted, **variant.facts)
    if row["cause"] == OTHER_WEIGHTS and wanted.strict and gf.four_bits_before(gf.read_gguf(base)):
        row["cause"] = f"it was rounded to 4 bits before it became {variant.type}"
        note(f"{variant.name:14} {row['cause']}")
    return row
