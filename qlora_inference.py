"""Use what was trained: answer, chat, compare, score, merge, combine.

    python qlora_inference.py "I laughed, I cried, I want to see it again."
    python qlora_inference.py                                   # a chat on a terminal, else lines from stdin
    python qlora_inference.py --adapter none "What is LoRA?"    # the base alone

Answers go to stdout, everything else to stderr.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from config import InferSettings, TrainSettings
from qlora import publishing
from qlora.cli import UsageError, UserError, note, parse, require, run
from qlora.runs_table import show_runs


def read_settings(argv: Sequence[str] | None) -> InferSettings:
    """Flags -> settings that go together."""
    s = parse(InferSettings, argv, __doc__)
    require(not (s.combine is not None and s.adapter), "--combine names the adapters: leave --adapter out")
    require((s.combine is None) == (s.output_dir is None), "--combine and --output-dir: both or none")
    named = s.combine != ()
    require(named, "--combine: name adapters, FOLDER:WEIGHT each")
    sparse = s.combination.startswith(("ties", "dare"))
    require(s.density is None or sparse, f"--density: {s.combination} keeps all entries; choose ties or dare")
    s = dataclasses.replace(s, adapter=s.adapter or ("qlora-out",))
    alone, one = s.adapter == ("none",), len(s.adapter) == 1
    asked = {"a prompt": s.prompt, "--prompts": s.prompts, "--evaluate": s.evaluate, "--merge": s.merge}
    asked |= {"--combine": s.combine, "--runs": s.runs}
    asked |= {"--push-to-hub": None if s.merge else s.push_to_hub}
    jobs = [name for name, value in asked.items() if value not in (None, False)]
    typed = not jobs and sys.stdin is not None and sys.stdin.isatty()
    require(one or "none" not in s.adapter, "--adapter none: nothing else can be loaded with it")
    both = (
        "--adapter none means the base alone, but there is a folder `none` here: write ./none, or rename it"
    )
    require(not (alone and Path("none").is_dir()), both)
    require(s.prompt is None or s.prompt.strip() != "", "the prompt is empty")
    require(len(jobs) < 2, f"{' and '.join(jobs)}: one thing at a time")
    require(bool(jobs) or sys.stdin is not None, "no prompt: give one, --prompts FILE, or lines on stdin")
    require(s.prompts is None or not s.prompts.is_dir(), f"--prompts {s.prompts}: a folder; name a file")
    require(s.prompts is None or s.prompts.is_file(), f"--prompts {s.prompts}: no such file")
    data_file = s.prompts is not None and s.prompts.suffix.lower() in (".csv", ".jsonl", ".parquet")
    require(s.answers is None or s.prompts is not None, "--answers: name the file of --prompts")
    require(s.answers or not data_file, f"--prompts {s.prompts}: for a data file add --answers OUT.csv")
    require(s.answers is None or one and not s.compare, "--answers: of one --adapter, without --compare")
    require(s.shots is None or s.evaluate and not s.compare, "--shots: with --evaluate, without --compare")
    require(all(0 <= n <= 10_000 for n in s.shots or ()), "--shots: numbers of examples, from 0 to 10,000")
    require(s.merge or s.merge_base == InferSettings.merge_base, "--merge-base: with --merge")
    require(s.merge is None or one and not alone, "--merge: exactly one --adapter is merged")
    here = Path(s.model if alone else s.adapter[0]).is_dir()
    require(
        not asked["--push-to-hub"] or one and here, "--push-to-hub: give one folder, --adapter or --model"
    )
    require(not (s.merge and s.compare), "--merge and --compare: one thing at a time")
    require(not (s.combine and s.compare), "--combine and --compare: one thing at a time")
    require(not (s.compare and alone), "--compare: needs an --adapter to compare with the base")
    require(not (typed and s.compare), "--compare: give prompts or --evaluate; in a chat use /base")
    samples = s.temperature > 0 or (s.top_p == 1 and s.top_k == 0)
    require(s.columns is None or s.evaluate or s.answers, "--columns: with --evaluate or --answers")
    require(s.shots != (), "--shots: name numbers of examples, like 0 4 16")
    require(samples, "--top-p and --top-k choose among samples: also give a --temperature above 0")
    all_used = one or typed or s.compare or s.evaluate
    require(all_used, "several --adapter: add --compare (side by side) or --evaluate (scores of each)")
    return s


def import_libraries() -> None:
    """The only late imports: they take seconds, so the flags are checked first."""
    global BitsAndBytesConfig, LoraConfig, PeftModel, TextStreamer, make_fast
    global adapters, answers, combining, generation, hardware, hub, loading, merging, plan, prompts, qat
    global scoring, shapes
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig, TextStreamer

    from qlora import (
        adapters,
        answers,
        combining,
        generation,
        hardware,
        hub,
        loading,
        merging,
        prompts,
        qat,
        scoring,
        shapes,
    )
    from qlora.fast import make_fast
    from qlora.memory import plan


def main(argv: Sequence[str] | None = None) -> None:
    s = read_settings(argv)
    if s.runs is not None:
        show_runs(s.runs or (Path("."),))
        return
    import_libraries()
    if s.combine:
        merging.check_target(s.output_dir, "--output-dir")
        combining.combine(s)
        return
    chosen = [
        adapters.read_adapter(Path(folder), adapters.OR_NONE) for folder in s.adapter if folder != "none"
    ]
    names = [adapter.name for adapter in chosen]
    require(len(set(names)) == len(names), f"--adapter: two folders have the same name ({', '.join(names)})")
    if s.merge:
        merging.check_target(s.merge)
    publishing.check(s)
    if s.push_to_hub and not s.merge:
        publishing.push_chosen(s, chosen)
        return

    job = answers.open_job(s, chosen[0] if chosen else None) if s.answers else None
    if job and job.is_complete:
        note(f"{job.out} holds all {job.done} answers; nothing to do")
        return

    # 1. The base, in the precision that the first adapter was trained on; by default NF4.
    name, why, precision, machine = choose_base(s, chosen)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=machine.dtype,
    )
    pinned = chosen[0].revision if chosen and name == chosen[0].base_model else None
    base = loading.load_base(name, precision, machine, pinned, four_bit if precision == "nf4" else None)
    note(f"base       {name} ({why}), {precision}")

    # 2. The adapters, small matrices beside the frozen ones; the first is active.
    model, grid = base.model, next((adapter.qat for adapter in chosen if adapter.qat), None)
    for adapter in chosen:
        if warning := adapters.check_base(adapter, base.info):
            note(f"note       {warning}")
        with adapters.fitting(adapter, base.info):
            if model is base.model:
                config = qat.register(LoraConfig.from_pretrained(adapter.folder), grid)
                named = {"adapter_name": adapter.peft_name, "config": config}
                model = PeftModel.from_pretrained(model, adapter.folder, **named)
            else:
                if grid:  # PEFT makes the layers by a config that it knows
                    config = qat.register(LoraConfig.from_pretrained(adapter.folder), grid)
                    model.add_adapter(adapter.peft_name, config)
                model.load_adapter(str(adapter.folder), adapter_name=adapter.peft_name)
            adapters.check_keys(adapter, model)
        qat.use_grid(model, adapter.peft_name, adapter.qat)
        note(f"adapter    {adapter.name}{f', through the grid of {adapter.qat}' if adapter.qat else ''}")
    make_fast(model, machine.lane)
    model.eval()

    # 3. Use them.
    if s.merge:
        kept = {"dtype": s.merge_dtype, "force": s.force}
        merging.merge_into(s.merge, s.merge_base, chosen[0], model, base, **kept)
        merging.write_card(s.merge, chosen[0], base)
        note(f"written    {s.merge}/: a plain model")
        merged = shlex.quote(str(s.merge))
        note(f'next       python qlora_inference.py --adapter none --model {merged} "the whole prompt"')
        publishing.push_model(s, s.merge)
    elif job:
        ask = lambda text: to_ids(s, chosen[0] if chosen else None, base, text)
        answers.write(job, model, base, ask, lambda rows: generate(s, model, base, rows))
    elif s.evaluate:
        scoring.evaluate(s, chosen, model, base)
    elif s.prompt is None and s.prompts is None and sys.stdin.isatty():
        chat(s, chosen, model, base)
    else:
        answer(s, chosen, model, base)


def choose_base(s: InferSettings, chosen: list):
    """(model, why, precision, hardware) that `auto` stands for."""
    trained, precision = chosen[0].base if chosen else None, s.precision
    if precision == "auto":
        named = chosen[0].base_model if chosen and s.model == "auto" else s.model
        precision = trained.precision if trained else shapes.stored_precision(shapes.peek(named))
    machine = hardware.detect(precision, s.device, s.lane)
    hardware.show(machine)
    if s.model != "auto":
        return s.model, "given", precision, machine
    if chosen:
        return chosen[0].base_model, f"what {chosen[0].name} was trained on", precision, machine
    job = plan.training_job(TrainSettings(precision=precision), machine)
    return *hub.or_ungated(*plan.default_model(machine, job)), precision, machine


def to_ids(s: InferSettings, adapter, base, text: str) -> list[int]:
    """The prompt as training wrote it (the adapter's own), or a plain chat message."""
    prompt = None if s.plain or not adapter else adapter.prompt
    ids, is_cut = prompts.typed_ids(base.tokenizer, prompt, text)
    if is_cut:
        note(f"note       longer than {prompt.max_length} tokens: only its end is read, as in training")
    if prompt and prompt.asks:
        return ids
    if len(ids) + s.max_new_tokens > base.context_length:
        both = f"the prompt's {len(ids)} tokens and --max-new-tokens {s.max_new_tokens}"
        raise UserError(f"{both} are over the {base.context_length} that the model reads; lower one of them")
    return ids


def generate(s: InferSettings, model, base, rows: list[list[int]], stream: bool = False) -> list[str]:
    """Continuations of a batch of prompts; with `stream` they are printed token by token."""
    tokenizer, sampling = base.tokenizer, generation.Sampling(s.temperature, s.top_p, s.top_k, s.seed)
    options = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(prompts.end_ids(tokenizer))}
    if stream:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    made = generation.generate(model, rows, s.max_new_tokens, sampling, **options)
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def answer(s: InferSettings, chosen: list, model, base) -> None:
    """One prompt, as it is written; a file of prompts or the lines of stdin, in batches."""
    texts = [s.prompt] if s.prompt is not None else read_lines(s.prompts)
    # All of them before the first is answered: one that is too long is told at once.
    rows = [[to_ids(s, adapter, base, text) for text in texts] for adapter in chosen or [None]]
    if s.prompt is not None and not s.compare:
        generate(s, model, base, rows[0], stream=True)
        return
    for start in range(0, len(texts), s.batch_size):
        batch, replies = slice(start, start + s.batch_size), []
        if s.compare:
            with model.disable_adapter():
                replies.append(("base", generate(s, model, base, rows[0][batch])))
        for adapter, own in zip(chosen or [None], rows):
            if adapter:
                model.set_adapter(adapter.peft_name)
            replies.append((adapter.name if adapter else "base", generate(s, model, base, own[batch])))
        show_replies(texts[batch], replies)


def read_lines(path: Path | None) -> list[str]:
    """Lines with text of a file, or of stdin."""
    content = sys.stdin.buffer.read() if path is None else path.read_bytes()
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UsageError(f"{f'--prompts {path}' if path else 'stdin'}: not text in UTF-8") from None
    require(bool(lines), "no prompt: give one, --prompts FILE, or lines on stdin")
    return lines


def show_replies(texts: list[str], replies: list[tuple[str, list[str]]]) -> None:
    """One line per prompt, so that two files pair up; of several models a block per prompt."""
    width = max(len(name) for name, _ in replies)
    for i, text in enumerate(texts):
        if len(replies) > 1:
            print(f"> {text if len(text) <= 100 else text[:97] + '…'}")
        for name, made in replies:
            who = f"  {name:{width}}  " if len(replies) > 1 else ""
            print(who + " ".join(made[i].split()), flush=True)


def chat(s: InferSettings, chosen: list, model, base) -> None:
    """Prompts typed at a terminal; /use NAME switches adapters, /base turns them off for one answer."""
    names, current = {a.name: a for a in chosen}, chosen[0] if chosen else None
    review = current and current.prompt and current.prompt.asks and not s.plain
    commands = ["/use NAME"] * (len(names) > 1) + ["/base TEXT"] * bool(names) + ["/quit"]
    note(f"Type {'a review' if review else 'a message'}; {', '.join(commands)}, or Ctrl-D to end.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            note()
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/use":
            if other := names.get(rest.strip()):
                current = other
                model.set_adapter(current.peft_name)
            found = f"adapter    {other.name}" if other else f"no adapter '{rest.strip()}'"
            note(f"{found}; loaded: {', '.join(names) or 'none'}")
            continue
        plain_base = command == "/base" and bool(names)
        if not (text := rest if plain_base else line):
            continue
        try:
            ids = to_ids(s, current, base, text)
            with model.disable_adapter() if plain_base else contextlib.nullcontext():
                generate(s, model, base, [ids], stream=True)
        except UserError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:  # stops this answer, not the chat
            note()


if __name__ == "__main__":
    run(
        main,
        "lower --batch-size or --max-new-tokens, shorten the prompt; --merge also holds the 16-bit model",
    )
