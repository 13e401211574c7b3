"""The page: what is on it, and what happens when something is clicked or moved."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gradio as gr

from config import PlaygroundSettings
from qlora.cli import UserError
from qlora.generation import Sampling
from qlora.playground import answers, chances, guards, markup, xray
from qlora.playground.models import Models

REVIEWS = {
    "a kind review": "The plot is thin, but the actors are wonderful and I left the cinema with a smile.",
    "a harsh one": "Two hours of explosions and not one line worth remembering.",
    "a hard one": "I wanted to like it. I really did.",
}
NO_ADAPTER = (
    "No adapter here yet: only the base answers. `python qlora_finetune.py` trains one into qlora-out; "
    "then start this page again."
)
WAITING = "Answer something, and it is shown here."


def told(error: UserError) -> gr.Error:
    return gr.Error(str(error), title="Not possible", duration=None, print_exception=False)


def sampling_of(s: PlaygroundSettings, draws: bool, temperature: float, top_p: float, top_k: int) -> Sampling:
    """How the answer is written: greedily unless `draws`."""
    return Sampling(temperature if draws else 0.0, top_p, int(top_k), s.seed)


def answering(s: PlaygroundSettings, models: Models) -> Callable:
    """The function of the button: yields what changes on the page after each token."""

    def answer(text, plain, name, precision, length, draws, temperature, top_p, top_k):
        try:
            models.use(precision)
            how = (int(length), sampling_of(s, draws, temperature, top_p, top_k))
            asked = answers.ask(models, name, text, plain, how)
        except UserError as error:
            raise told(error) from None
        same = gr.skip()
        for number, so_far in enumerate(answers.reply(models, asked)):
            said, speed = (*so_far.texts, "")[:2], how_fast(so_far, asked)
            if number:
                yield (*said, same, same, same, same, speed)
                continue
            kept = so_far.logits.clone()
            seen = markup.xray(xray.tokens(models.base.tokenizer, asked.prompt, asked.ids))
            yield (*said, same, show_next(models, temperature, top_p, top_k, kept), kept, seen, speed)
            yield (same, same, markup.labels(chances.of_labels(models, asked, kept)), *(same,) * 4)

    return answer


def how_fast(so_far: answers.Reply, asked: answers.Asked) -> str:
    count, since = max(map(len, so_far.tokens)), so_far.seconds - so_far.first_seconds
    words = f"first token after {so_far.first_seconds:.2f} s"
    words += f", then {(count - 1) / since:.1f} tokens a second in each answer" if count > 1 else ""
    cut = f" Longer than {asked.prompt.max_length} tokens: only its end was read." if asked.is_cut else ""
    return f'<div class="aside">{words}.{cut}</div>'


def show_next(models: Models, temperature: float, top_p: float, top_k: int, kept) -> str:
    """The next token's distribution by the logits that were kept; the model does not run again."""
    if kept is None:
        return markup.card("The first token of the answer", WAITING, "")
    sampling = Sampling(temperature, top_p, int(top_k))
    return markup.next_tokens(chances.of_tokens(models.base.tokenizer, kept, sampling))


@dataclass
class Parts:
    """What is on the page and changes, or is read."""

    text: gr.Textbox
    plain: gr.Checkbox
    name: gr.Dropdown
    precision: gr.Dropdown
    buttons: list[gr.Button]  # Answer, Stop
    length: gr.Slider
    draws: gr.Checkbox
    knobs: list[gr.Slider]  # temperature, top-p, top-k
    head: gr.HTML
    notes: gr.HTML
    said: list[gr.Textbox]  # of the base and of the adapter
    scored: gr.HTML
    following: gr.HTML
    seen: gr.HTML
    speed: gr.HTML


def build(s: PlaygroundSettings, models: Models) -> gr.Blocks:
    """The page with its events; `models` holds the first precision already."""
    with gr.Blocks(title="Playground", analytics_enabled=False, fill_width=True) as page:
        connect(lay_out(s, models), s, models)
    return page


def lay_out(s: PlaygroundSettings, models: Models) -> Parts:
    """From top to bottom, so that all but the X-ray fits into 1280 x 800."""
    names, first = list(models.adapters), next(iter(models.adapters), None)
    has_one, note = bool(names), notes_of(s, models, first)
    head = gr.HTML(markup.head(models.described()))
    notes = gr.HTML(markup.notice(note), visible=bool(note))
    with gr.Row():
        with gr.Column(scale=5):
            text = gr.Textbox(label="A review, or a message", lines=3, max_lines=8, elem_id="text")
        with gr.Column(scale=3):
            with gr.Row():
                name = gr.Dropdown(names, label="Adapter", visible=has_one, min_width=120)
                kinds = models.precisions
                precision = gr.Dropdown(kinds, value=models.precision, label="Base in", min_width=90)
            with gr.Row():
                go = gr.Button("Answer", variant="primary", size="md", min_width=80, elem_id="answer")
                stop = gr.Button("Stop", size="md", min_width=80)
    with gr.Row(elem_id="examples"):
        for title, review in REVIEWS.items():
            example = gr.Button(title, size="sm", min_width=60)
            example.click(partial(str, review), None, text, queue=False, api_visibility="private")
        question = "Without the adapter's question around it"
        plain = gr.Checkbox(label=question, visible=has_one, container=False, min_width=300)
    with gr.Row():
        said = [gr.Textbox(label="Base", lines=2, max_lines=10, elem_id="base")]
        box = gr.Textbox(label="Adapter", lines=2, max_lines=10, elem_id="adapter", visible=has_one)
        said.append(box)
    speed = gr.HTML('<div class="aside">&nbsp;</div>')
    with gr.Row():
        with gr.Column():
            scored = gr.HTML(markup.card("Labels", WAITING, ""), elem_id="labels", visible=has_one)
            length, draws, knobs = sliders(s)
        with gr.Column():
            following = gr.HTML(show_next(models, 1, 1, 0, None), elem_id="next")
    seen = gr.HTML(markup.card("Token X-ray", WAITING, ""), elem_id="xray")
    chosen = (text, plain, name, precision, [go, stop], length, draws, knobs)
    return Parts(*chosen, head, notes, said, scored, following, seen, speed)


def connect(parts: Parts, s: PlaygroundSettings, models: Models) -> None:
    """What happens when something is clicked, typed or moved."""
    one = {"concurrency_id": "model", "concurrency_limit": 1}  # the model does one thing at a time
    kept, (go, stop) = gr.State(None), parts.buttons
    asked = [parts.text, parts.plain, parts.name, parts.precision, parts.length, parts.draws, *parts.knobs]
    shown = [*parts.said, parts.scored, parts.following, kept, parts.seen, parts.speed]
    named = {"api_name": "answer", "show_progress": "hidden"}
    runs = gr.on([go.click, parts.text.submit], answering(s, models), asked, shown, **named, **one)
    stop.click(None, cancels=[runs])
    for knob in parts.knobs:
        knob.change(
            lambda *values: show_next(models, *values),
            [*parts.knobs, kept],
            parts.following,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
    for choice in (parts.name, parts.precision):
        changed = ([parts.name, parts.precision], [parts.head, parts.notes, parts.precision])
        choice.input(switching(s, models), *changed, api_visibility="private", **one)


def sliders(s: PlaygroundSettings) -> tuple:
    """(new tokens, whether answers are drawn, [temperature, top-p, top-k])"""
    with gr.Row():
        temperature = gr.Slider(
            0.1, 3, 1, step=0.05, label="Temperature", min_width=200, elem_id="temperature"
        )
        top_p = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p", min_width=200, elem_id="top-p")
    with gr.Row():
        top_k = gr.Slider(0, 100, 0, step=1, label="Top-k (0: all)", min_width=200, elem_id="top-k")
        most = max(256, s.max_new_tokens)
        length = gr.Slider(1, most, s.max_new_tokens, step=1, label="New tokens, at the most", min_width=200)
    draws = gr.Checkbox(label="Answers are drawn so; else always the likeliest token", container=False)
    return length, draws, [temperature, top_p, top_k]


def switching(s: PlaygroundSettings, models: Models) -> Callable:
    """The function of the two menus: the base in another precision is loaded at once."""

    def switch(name, precision):
        try:
            models.use(precision)
        except UserError as error:
            gr.Warning(str(error), title="Not possible", duration=None)
        words = notes_of(s, models, name)
        notes = gr.update(value=markup.notice(words), visible=bool(words))
        return markup.head(models.described()), notes, models.precision

    return switch


def notes_of(s: PlaygroundSettings, models: Models, name: str | None) -> str:
    """What to know about this adapter and precision."""
    if not models.adapters:
        return "" if s.adapter else NO_ADAPTER
    return models.warnings.get(name, "")


def serve(page: gr.Blocks, s: PlaygroundSettings) -> None:
    """Start the server in threads of its own; OSError where the port is taken."""
    plain = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # fonts that are here
    page.launch(
        server_name=s.host,
        server_port=s.port,
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        app_kwargs={"middleware": guards.middleware(s.host)},
        theme=gr.themes.Base(font=plain[0], font_mono=plain[1], text_size="sm", spacing_size="sm"),
        css_paths=[Path(__file__).with_name("page.css")],
    )


def stop(page: gr.Blocks) -> None:
    """At once: an open page keeps a connection, which uvicorn would wait for, and would tell of."""
    logging.getLogger("uvicorn.error").disabled = True
    page.server.force_exit = True
    page.close(verbose=False)
