"""Held-out rows scored by an adapter: --evaluate of qlora_inference.py, --test of qlora_finetune.py."""

from config import SENTIMENT_ANSWERS, InferSettings, TrainSettings
from qlora import adapters, data, evaluation, hardware, measures, pair_scores, prompts, shots
from qlora.batches import encode_rows
from qlora.cli import UserError, note, progress, require


def score_run(s: TrainSettings) -> None:
    """Score the adapter in --output-dir as it was trained, on the rows that its training held out."""
    usual = (s.dataset, s.columns, s.model) == (TrainSettings.dataset, None, TrainSettings.model)
    other = "python qlora_inference.py --evaluate --dataset … scores it on others"
    require(usual, f"--test scores the rows that its training held out, on its own base; {other}")
    require(s.output_dir.is_dir(), f"--test: no folder {s.output_dir}; --output-dir names a trained adapter")
    there = (s.output_dir / adapters.CONFIG).is_file()
    require(there, f"--test: no adapter in {s.output_dir}; if its run was stopped: --resume")
    adapter = adapters.read_adapter(s.output_dir)
    model, base = adapters.load_trained(adapter, s.device, s.lane)
    hardware.show(base.hardware)
    model.set_adapter(adapter.peft_name)
    asked = InferSettings(adapter=(str(s.output_dir),), evaluate=True, eval_samples=s.eval_samples)
    evaluate(asked, [adapter], model, base)


def evaluate(s: InferSettings, chosen: list, model, base) -> None:
    """Accuracy, or perplexity of text and conversations, with each adapter's own prompt.

    By default on the rows that its training held out.
    """
    reviews = prompts.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, TrainSettings.max_length)
    for adapter in chosen or [None]:
        prompt = adapter.prompt if adapter else reviews
        if prompt is None:
            raise UserError(
                f"{adapter.name} has no qlora.json: the prompt that it was trained with is unknown"
            )
        own = adapter.dataset.get("name", "imdb") if adapter else "imdb"
        name = s.dataset if s.dataset != "auto" else own
        trained = adapter.trained_on(name) if adapter else {"seed": s.seed}  # the base: on none of them
        rows, found = data.held_out_rows(name, trained, s.eval_samples, s.columns)
        match(name, found, prompt, adapter)
        require(s.shots is None or prompt.asks, "--shots: the adapter was not trained on labels")
        note(f"data       {found.origin}: {len(rows)} held-out rows")
        if adapter:
            model.set_adapter(adapter.peft_name)
        if s.shots is not None:
            pool = shots.rows_to_show(name, trained, found, rows, s.shots)
            shots.show(base, model, (prompt, adapter), (rows, pool), s.shots)
            continue
        if adapter and s.compare:
            with model.disable_adapter():
                show_score(base, model, prompt, rows, "base")
        show_score(base, model, prompt, rows, adapter.name if adapter else "base")


def match(dataset: str, found: data.RowSet, prompt: prompts.PromptFormat, adapter) -> None:
    """Raises UsageError where the rows are none that such a prompt is made of."""
    kinds = {"sentiment": ("labels",), "lm": ("labels", "text"), "chat": ("chat",)}[prompt.objective]
    wanted = {"sentiment": "labelled rows", "lm": "texts", "chat": "conversations"}[prompt.objective]
    if adapter and adapter.dataset.get("kind") == "pairs":
        kinds, wanted = ("pairs",), "pairs"
    require(found.kind in kinds, f"--dataset {dataset} has other rows: the adapter was trained on {wanted}")
    if prompt.asks:
        match_answers(dataset, found.answers, prompt.answers)


def match_answers(dataset: str, labels: tuple[str, ...], answers: tuple[str, ...]) -> None:
    """An adapter's answers stand for a dataset's labels, by their order; as many of them, or UsageError."""
    there, ours = ", ".join(labels) or "none", ", ".join(answers)
    what = f"--dataset {dataset}: its labels are {there}, but the adapter answers {ours}"
    require(len(labels) == len(answers), what)
    if labels != answers:
        pairs = ", ".join(f"{label} = {answer}" for label, answer in zip(labels, answers))
        note(f"note       labels are matched with the adapter's answers by their order: {pairs}")


def show_score(base, model, prompt, rows: list, who: str) -> None:
    """One line on stdout: accuracy, its interval and the confusion counts; or perplexity; or pairs won."""
    if rows[0].rejected:
        result = pair_scores.score_pairs(base, model, prompt, rows, who)
        said = "log P(chosen) > log P(rejected) in {correct} of {rows} pairs".format(**result)
        print(f"{who:22} {measures.with_interval(result)}   {said}", flush=True)
        return
    if not prompt.asks:
        examples = encode_rows(base.tokenizer, prompt, rows, "held-out")
        with progress(len(examples), who) as step:
            result = evaluation.perplexity(model, examples, base.hardware.autocast, step)
        tokens = f"{result['tokens']:,} tokens of {result['rows']} rows"
        print(f"{who:22} perplexity {result['perplexity']:.3f}   ({tokens})", flush=True)
        return
    ids = [prompts.sentiment_prompt(base.tokenizer, prompt, row.text) for row in rows]
    predicted = evaluation.score_answers(base, model, prompt, ids, who).argmax(1).tolist()
    result = evaluation.accuracy_report(predicted, [row.label for row in rows], prompt.answers)
    confusion = result["confusion"].items()
    counts = [f"{truth} read as {said} {n}" for truth, row in confusion for said, n in row.items()]
    right, low, high = (measures.percent(result[key]) for key in ("accuracy", "low", "high"))
    print(f"{who:22} {right:>6}   {low} to {high}   ({', '.join(counts)})", flush=True)
