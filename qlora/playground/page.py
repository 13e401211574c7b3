"""The page: what is on it, and what happens when something is clicked or moved."""

from collections.abc import Callable
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from config import PlaygroundSettings
from qlora.cli import UserError
from qlora.generation import Sampling
from qlora.playground import answers, chances, markup, xray
from qlora.playground.models import Models

# The browser itself refuses what would lead elsewhere: scripts, fonts, pictures, requests.
ONLY_HERE = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; frame-ancestors 'self'"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
REVIEWS = (
    "The plot is thin, but the actors are wonderful and I left the cinema with a smile.",
    "Two hours of explosions and not one line worth remembering.",
    "I wanted to like it. I really did.",
)
NO_ADAPTER = (
    "No adapter here yet: only the base answers. `python qlora_finetune.py` trains one into qlora-out; "
    "then start this page again."
)
WAITING = "Answer something, and it is shown here."


class OnlyHere:
    """Adds the rule ONLY_HERE to every answer of the server."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_rule(message):
            if message["type"] == "http.response.start":
                rule = (b"content-security-policy", ONLY_HERE.encode())
                message = {**message, "headers": [*message.get("headers", ()), rule]}
            await send(message)

        await self.app(scope, receive, with_rule)


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


def build(s: PlaygroundSettings, models: Models) -> gr.Blocks:
    """The page with its events; `models` holds the first precision already."""
    names = list(models.adapters)
    with gr.Blocks(title="Playground", analytics_enabled=False, fill_width=True) as page:
        kept = gr.State(None)
        head = gr.HTML(markup.head(models.described()))
        notes = gr.HTML(markup.notice(notes_of(s, models, names[0] if names else None)))
        with gr.Row(equal_height=True):
            with gr.Column(scale=5):
                text = gr.Textbox(label="A review, or a message", lines=3, max_lines=8, elem_id="text")
                gr.Examples([[review] for review in REVIEWS], [text], label="Examples")
            with gr.Column(scale=3):
                with gr.Row():
                    name = gr.Dropdown(names, label="Adapter", visible=bool(names), min_width=120)
                    precision = gr.Dropdown(
                        models.precisions, value=models.precision, label="Base in", min_width=90
                    )
                length = gr.Slider(
                    1, max(256, s.max_new_tokens), s.max_new_tokens, step=1, label="New tokens, at the most"
                )
                plain = gr.Checkbox(label="Without the adapter's question around it", visible=bool(names))
                with gr.Row():
                    go = gr.Button("Answer", variant="primary", elem_id="answer")
                    stop = gr.Button("Stop", min_width=80)
        with gr.Row():
            said = [gr.Textbox(label="Base", lines=3, max_lines=10, elem_id="base")]
            said.append(
                gr.Textbox(label="Adapter", lines=3, max_lines=10, elem_id="adapter", visible=bool(names))
            )
        speed = gr.HTML('<div class="aside">&nbsp;</div>')
        with gr.Row():
            with gr.Column(scale=1):
                scored = gr.HTML(markup.card("Labels", WAITING, ""), elem_id="labels", visible=bool(names))
                knobs = [
                    gr.Slider(0.1, 3, 1, step=0.05, label="Temperature", elem_id="temperature"),
                    gr.Slider(0.01, 1, 1, step=0.01, label="Top-p", elem_id="top-p"),
                    gr.Slider(0, 100, 0, step=1, label="Top-k (0: all)", elem_id="top-k"),
                ]
                draws = gr.Checkbox(label="Answers are drawn so; else always the likeliest token")
            with gr.Column(scale=1):
                following = gr.HTML(show_next(models, 1, 1, 0, None), elem_id="next")
        seen = gr.HTML(markup.card("Token X-ray", WAITING, ""), elem_id="xray")
        asked = [text, plain, name, precision, length, draws, *knobs]
        shown = [*said, scored, following, kept, seen, speed]
        one = {"concurrency_id": "model", "concurrency_limit": 1}
        runs = gr.on(
            [go.click, text.submit],
            answering(s, models),
            asked,
            shown,
            show_progress="hidden",
            api_name="answer",
            **one,
        )
        stop.click(None, cancels=[runs])
        for knob in knobs:
            knob.change(
                lambda *values: show_next(models, *values),
                [*knobs, kept],
                following,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
        switched = ([name, precision], [head, notes, precision])
        for choice in (name, precision):
            choice.input(switching(s, models), *switched, api_visibility="private", **one)
    return page


def switching(s: PlaygroundSettings, models: Models) -> Callable:
    """The function of the two menus: the base in another precision is loaded at once."""

    def switch(name, precision):
        try:
            models.use(precision)
        except UserError as error:
            gr.Warning(str(error), title="Not possible", duration=None)
        return (
            markup.head(models.described()),
            markup.notice(notes_of(s, models, name)),
            models.precision,
        )

    return switch


def notes_of(s: PlaygroundSettings, models: Models, name: str | None) -> str:
    """What to know about this adapter and precision."""
    if not models.adapters:
        return "" if s.adapter else NO_ADAPTER
    return models.warnings.get(name, "")


def serve(page: gr.Blocks, s: PlaygroundSettings) -> None:
    """Start the server in threads of its own; OSError where the port is taken."""
    plain = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # fonts that are here
    guards = [Middleware(OnlyHere)]
    if s.host in LOOPBACK:  # no page of the web reaches it by a name that leads here
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
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
        app_kwargs={"middleware": guards},
        theme=gr.themes.Base(font=plain[0], font_mono=plain[1], text_size="sm", spacing_size="sm"),
        css_paths=[Path(__file__).with_name("page.css")],
    )
