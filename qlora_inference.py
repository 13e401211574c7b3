"""Use what was trained: answer, chat, compare, score, merge.

    python qlora_inference.py "I laughed, I cried, I want to see it again."
    python qlora_inference.py                                   # a chat on a terminal, else lines from stdin
    python qlora_inference.py --adapter none "What is LoRA?"    # the base alone

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Sequence

from config import EVAL_SAMPLES, InferSettings
from qlora.cli import UsageError, UserError, note, parse, require, run


def read_settings(argv: Sequence[str] | None) -> InferSettings:
    s = parse(InferSettings, argv, __doc__)
    s.adapter = s.adapter or ("qlora-out",)
    require(s.temperature >= 0, f"--temperature {s.temperature}: 0 (greedy) or above")
    require(0 < s.top_p <= 1, f"--top-p {s.top_p}: above 0, at most 1")
    require(s.top_k >= 0, f"--top-k {s.top_k}: 0 (off) or above")
    require(s.max_new_tokens > 0, f"--max-new-tokens {s.max_new_tokens}: at least 1")
    require(s.batch_size > 0, f"--batch-size {s.batch_size}: at least 1")
    require(s.eval_samples is None or s.eval_samples > 0, f"--eval-samples {s.eval_samples}: at least 1")
    require(0 <= s.seed < 2**32, f"--seed {s.seed}: between 0 and 2**32 - 1")
    require("none" not in s.adapter or len(s.adapter) == 1, "--adapter none: nothing else can be loaded with it")
    require(not (s.compare and s.adapter == ("none",)), "--compare: an --adapter is needed to compare with the base")
    require(s.prompt is None or s.prompt.strip() != "", "the prompt is empty")
    require(s.merge is None or len(s.adapter) == 1 and s.adapter != ("none",), "--merge: exactly one --adapter is merged")
    require(s.temperature > 0 or (s.top_p == 1 and s.top_k == 0), "--top-p and --top-k choose among samples: give a --temperature above 0, too")
    asked = {"a prompt": s.prompt, "--prompts": s.prompts, "--evaluate": s.evaluate or None, "--merge": s.merge}
    jobs = [name for name, value in asked.items() if value is not None]
    require(len(jobs) < 2, f"{' and '.join(jobs)}: one thing at a time")
    if s.prompts is not None:
        require(s.prompts.is_file(), f"--prompts {s.prompts}: no such file")
    require(bool(jobs) or sys.stdin is not None, "no prompt given: as an argument, with --prompts FILE, or as lines on stdin")
    require(not (s.merge and s.compare), "--merge and --compare: one thing at a time")
    typed = not jobs and sys.stdin.isatty()
    require(not (typed and s.compare), "--compare: give a prompt, --prompts FILE, lines on stdin, or --evaluate; in a chat, /base asks the base")
    require(len(s.adapter) == 1 or typed or s.compare or s.evaluate, "several --adapter: add --compare to see them side by side (a chat switches them, --evaluate scores each)")
    return s


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(argv)
    from qlora.merging import claim_target, merge_into

    # What can be checked without a model is checked before one is loaded.
    adapters = load_notes(settings)
    if settings.merge:
        claim_target(settings.merge)
    model, base, hardware = load(settings, adapters)
    if settings.merge:
        merge_into(settings.merge, settings.merge_base, adapters[0], model, base, hardware)
        note(f"written    {settings.merge}/: a plain model")
        note(f'next       python qlora_inference.py --adapter none --model {settings.merge} "..."  (plain: send the whole prompt yourself)')
    elif settings.evaluate:
        evaluate(settings, adapters, model, base, hardware)
    elif settings.prompt is None and settings.prompts is None and sys.stdin.isatty():
        chat(settings, adapters, model, base)
    else:
        answer(settings, adapters, model, base)


def load_notes(settings: InferSettings):
    from qlora.adapters import read_adapter

    if settings.adapter == ("none",):
        return []
    adapters = [read_adapter(Path(folder)) for folder in settings.adapter]
    names = [a.name for a in adapters]
    if len(set(names)) < len(names):
        raise UsageError(f"--adapter: two folders have the same name ({', '.join(names)}); rename one, names select adapters in a chat")
    return adapters


def load(settings: InferSettings, adapters):
    """Base (4-bit or not) with all adapters in it, the first one active."""
    from peft import PeftModel
    from transformers import GenerationConfig

    from qlora.adapters import check_base
    from qlora.fast import speed_up_base, speed_up_lora
    from qlora.hardware import detect, show
    from qlora.loading import first_line, load_base
    from qlora.memory import Job
    from qlora.plan import default_model

    trained = adapters[0].base if adapters else None
    precision = settings.precision if settings.precision != "auto" else trained.precision if trained else "nf4"
    hardware = detect(precision)
    show(hardware)
    if settings.model != "auto":
        name, why = settings.model, "given"
    else:
        name, why = (adapters[0].base_model, f"what {adapters[0].name} was trained on") if adapters else default_model(hardware, Job(precision, dtype=hardware.dtype))
    pinned = trained.revision if trained and name == trained.name else None  # the hub's main branch may have moved on
    base = load_base(name, precision, hardware, pinned or None)
    base.model.generation_config = GenerationConfig()  # what a model ships (repetition penalty, top-p) would bend greedy and top-p 1
    note(f"base       {name} ({why}), {precision}")
    model = base.model
    speed_up_base(model)
    for adapter in adapters:
        warning = check_base(adapter, base.info)
        if warning:
            note(f"note       {warning}")
        try:
            if adapter is adapters[0]:
                model = PeftModel.from_pretrained(model, adapter.folder, adapter_name=adapter.peft_name)
            else:
                model.load_adapter(str(adapter.folder), adapter_name=adapter.peft_name)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:  # PEFT's words for what does not fit
            raise UserError(f"--adapter {adapter.folder} does not fit {name} ({first_line(error)})") from None
        note(f"adapter    {adapter.name}")
    if adapters:
        model.set_adapter(adapters[0].peft_name)
        speed_up_lora(model)
    return model.eval(), base, hardware


def to_ids(settings: InferSettings, adapter, base, text: str) -> list[int]:
    """The prompt as training wrote it (the adapter's own), or a plain chat message."""
    from qlora import prompts as p
    from qlora.loading import context_length

    prompt = adapter.prompt if adapter else None
    if prompt and prompt.objective == "sentiment" and not settings.plain:
        ids = p.sentiment_prompt(base.tokenizer, prompt, text)
        if len(p.render(base.tokenizer, p.sentiment_messages(prompt, text), True)) > len(ids):
            note(f"note       longer than {prompt.max_length} tokens: the model reads the end of it, as in training")
        return ids
    if prompt and prompt.objective == "lm" and not settings.plain:
        ids = base.tokenizer(p.clean(text))["input_ids"]
    else:
        ids = p.render(base.tokenizer, [{"role": "user", "content": text}], True)
    limit = context_length(base.model)
    if len(ids) + settings.max_new_tokens > limit:
        raise UserError(f"the prompt is {len(ids)} tokens; with --max-new-tokens {settings.max_new_tokens} that is over the {limit} that the model reads; shorten one of them")
    return ids


def generate(settings: InferSettings, model, base, rows: list[list[int]], streamer=None) -> list[str]:
    """Continuations of a batch of prompts (padded on the left, so that all end at the same position)."""
    import torch
    from transformers import GenerationConfig, set_seed

    from qlora.prompts import end_ids

    set_seed(settings.seed)
    longest, pad = max(map(len, rows)), base.tokenizer.pad_token_id
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k} if settings.temperature else {}
    config = GenerationConfig(
        do_sample=settings.temperature > 0, max_new_tokens=settings.max_new_tokens,
        pad_token_id=pad, eos_token_id=sorted(end_ids(base.tokenizer)), **sampling,
    )
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
    return [text.strip() for text in base.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def side_by_side(settings: InferSettings, adapters, model, base, texts: list[str], rows: list[list[list[int]]]) -> None:
    """The base's answers to the first adapter's prompts beside those of each adapter to its own; `rows`: token ids by adapter."""
    with model.disable_adapter():
        answers = [("base", generate(settings, model, base, rows[0]))]
    for adapter, own in zip(adapters, rows):
        model.set_adapter(adapter.peft_name)
        answers.append((adapter.name, generate(settings, model, base, own)))
    width = max(len(name) for name, _ in answers)
    for i, text in enumerate(texts):
        print(f"> {text if len(text) <= 100 else text[:97] + '…'}")
        for name, replies in answers:
            print(f"  {name:{width}}  {' '.join(replies[i].split())}", flush=True)


def answer(settings: InferSettings, adapters, model, base) -> None:
    """One prompt as it is written, token by token; a file of prompts or the lines of stdin: one line of answer each."""
    from transformers import TextStreamer

    if settings.prompt is not None:
        texts = [settings.prompt]
    elif settings.prompts is not None:
        texts = read_lines(f"--prompts {settings.prompts}", settings.prompts.read_bytes())
    else:
        texts = read_lines("stdin", sys.stdin.buffer.read())
    if not texts:
        raise UsageError("no prompt given: as an argument, with --prompts FILE, or as lines on stdin")
    # All of them before the first is answered: one that is too long is told at once.
    rows = [[to_ids(settings, adapter, base, text) for text in texts] for adapter in adapters or [None]]
    if settings.prompt is not None and not settings.compare:
        generate(settings, model, base, rows[0], TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True))
        return
    for start in range(0, len(texts), settings.batch_size):
        batch = slice(start, start + settings.batch_size)
        if settings.compare:
            side_by_side(settings, adapters, model, base, texts[batch], [own[batch] for own in rows])
        else:
            for reply in generate(settings, model, base, rows[0][batch]):
                print(" ".join(reply.split()), flush=True)  # one line per prompt, so that the two files pair up


def read_lines(name: str, content: bytes) -> list[str]:
    try:
        return [line.strip() for line in content.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not text in UTF-8") from None


def chat(settings: InferSettings, adapters, model, base) -> None:
    """Prompts typed at a terminal; /use NAME switches adapters, /base turns them off for one answer, /quit ends."""
    from transformers import TextStreamer

    names = {a.name: a for a in adapters}
    current = adapters[0] if adapters else None
    what = "a review" if current and current.prompt and current.prompt.objective == "sentiment" and not settings.plain else "a message"
    commands = (["/use NAME"] if len(names) > 1 else []) + (["/base TEXT"] if names else []) + ["/quit"]
    note(f"Type {what}; {', '.join(commands)}, or Ctrl-D to end.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            note()
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/use"):
            wanted = line.removeprefix("/use").strip()
            if wanted in names:
                current = names[wanted]
                model.set_adapter(current.peft_name)
                note(f"adapter    {wanted}")
            else:
                note(f"no adapter '{wanted}'; loaded: {', '.join(names) or 'none'}")
            continue
        plain_base = line.startswith("/base") and names
        text = line.removeprefix("/base").strip() if plain_base else line
        if not text:
            continue
        try:
            ids = to_ids(settings, current, base, text)
            streamer = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
            if plain_base:
                with model.disable_adapter():
                    generate(settings, model, base, [ids], streamer)
            else:
                generate(settings, model, base, [ids], streamer)
        except UserError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:  # stops this answer, not the chat
            note()


def evaluate(settings: InferSettings, adapters, model, base, hardware) -> None:
    """Accuracy on held-out rows, with each adapter's own prompt; by default the rows that its training run held out."""
    from qlora.data import identity, load_rows, split

    for adapter in adapters or [None]:
        prompt = adapter.prompt if adapter else default_prompt()
        if prompt is None or prompt.objective != "sentiment":
            raise UserError("--evaluate scores answers to labelled rows; this adapter was not trained on labels")
        trained = adapter.dataset if adapter else {"name": "imdb", "seed": settings.seed}
        name = settings.dataset if settings.dataset != "auto" else trained["name"]
        found = load_rows(name)
        if found.kind != "labels" or found.answers != prompt.answers:
            raise UsageError(f"--dataset {name}: answers {', '.join(found.answers) or 'none'}, but the adapter answers {', '.join(prompt.answers)}")
        # Held-out rows are drawn first, so more of them than the training run held out would be its training rows.
        own = name == trained["name"] or "sha256" in trained and identity(name).get("sha256") == trained["sha256"]
        held_out = trained.get("eval_samples", EVAL_SAMPLES) if own else len(found.held_out) or len(found.rows) - 1
        count = settings.eval_samples or min(held_out, EVAL_SAMPLES)
        if adapter and own and not found.held_out and count > held_out:
            raise UsageError(f"--eval-samples {count}: {adapter.name} held out {held_out} rows of {name}; the next ones were trained on")
        _, rows = split(found, 1, count, trained["seed"])
        note(f"data       {found.origin}: {len(rows)} held-out rows")
        if adapter is None:
            show_score(base, model, prompt, rows, "base", hardware)
            return
        model.set_adapter(adapter.peft_name)
        if settings.compare:
            with model.disable_adapter():
                show_score(base, model, prompt, rows, "base", hardware)
        show_score(base, model, prompt, rows, adapter.name, hardware)


def show_score(base, model, prompt, rows, title, hardware) -> None:
    from qlora import evaluation as e
    from qlora.before_after import label_scores
    from qlora.report import percent

    scores = label_scores(hardware, base, model, prompt, rows, title)
    result = e.accuracy_report(scores.argmax(1).tolist(), [row.label for row in rows], prompt.answers)
    counts = ", ".join(f"{truth} read as {said} {n}" for truth, row in result["confusion"].items() for said, n in row.items())
    print(f"{title:22} {percent(result['accuracy']):>6}   {percent(result['low'])} to {percent(result['high'])}   ({counts})", flush=True)


def default_prompt():
    from config import SENTIMENT_ANSWERS, SENTIMENT_SYSTEM, SENTIMENT_USER, TrainSettings
    from qlora.prompts import PromptFormat

    return PromptFormat("sentiment", TrainSettings().max_length, SENTIMENT_SYSTEM, SENTIMENT_USER, SENTIMENT_ANSWERS)


if __name__ == "__main__":
    run(main)
