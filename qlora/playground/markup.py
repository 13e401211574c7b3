"""Numbers and tokens as HTML. Everything that comes from outside is escaped."""

from html import escape

from qlora.playground.chances import Chances
from qlora.playground.xray import Token

# Tokens of the X-ray; of a longer prompt its two ends.
MOST_TOKENS = 400
KINDS = {"control": "control tokens", "frame": "template and question", "typed": "what you typed"}


def card(title: str, aside: str, body: str) -> str:
    return f'<div class="card"><h2>{title}</h2><div class="aside">{aside}</div>{body}</div>'


def notice(text: str) -> str:
    """A line that stands out; `like this` is set as code."""
    parts = escape(text).split("`")
    inner = "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    return f'<div class="notice">{inner}</div>' if text else ""


def head(described: str) -> str:
    return f'<div id="head"><h1>Playground</h1><span>{escape(described)}</span></div>'


def key(columns: int) -> str:
    """Which colour is whose."""
    names = ("base", "adapter")[:columns]
    return "".join(f'<span class="key {name}"></span>{name}' for name in names)


def bars(chances: Chances) -> str:
    """A row for each name, in it a bar for each column, on one scale from 0 to 100%."""
    rows = []
    for name, shares in zip(chances.names, chances.shares):
        drawn = "".join(map(bar, ("base", "adapter"), shares))
        rows.append(f'<tr><th title="{escape(name)}">{escape(name)}</th><td>{drawn}</td></tr>')
    return f'<table class="bars">{"".join(rows)}</table>'


def bar(whose: str, share: float) -> str:
    """Its number stands at its end, so a bar of 100% leaves room for it."""
    drawn = f'<i class="{whose}" style="width: {76 * share:.2f}%"></i><b>{percent(share)}</b>'
    return f'<div class="bar">{drawn}</div>'


def percent(share: float) -> str:
    """0.5 -> '50.0%', 0.00001 -> '<0.1%', 0 -> '0'"""
    return "0" if share == 0 else "<0.1%" if share < 0.0005 else f"{share:.1%}"


def by_column(values: list[str]) -> str:
    """['3', '5'] -> '3 (base), 5 (adapter)'; of one column its value alone"""
    return values[0] if len(values) == 1 else f"{values[0]} (base), {values[1]} (adapter)"


def labels(chances: Chances | None) -> str:
    title = "Labels"
    if chances is None:
        return card(title, "This prompt asks for no label.", "")
    held = by_column([percent(share) for share in chances.held])
    aside = f"Shares among the labels. All labels together hold {held} of all that could come next."
    return card(title, aside, bars(chances))


def next_tokens(chances: Chances) -> str:
    bits = by_column([f"{value:.2f}" for value in chances.entropy_bits])
    left = by_column([f"{count:,}" for count in chances.left])
    aside = f"{key(len(chances.left))}<br>Entropy {bits} bits; tokens that can be drawn: {left}."
    return card("The first token of the answer", aside, bars(chances))


def xray(found: list[Token]) -> str:
    half = MOST_TOKENS // 2
    cut = len(found) - MOST_TOKENS
    shown = [found] if cut <= 0 else [found[:half], found[-half:]]
    gap = f'<span class="aside">… {cut:,} more …</span>'
    chips = gap.join("".join(map(chip, part)) for part in shown)
    names = "".join(f'<span class="key {kind}"></span>{name}' for kind, name in KINDS.items())
    counts = f"{len(found):,} tokens, {sum(token.kind == 'typed' for token in found):,} of them typed."
    return card(
        "Token X-ray", f"{names}<br>{counts} Below each its id.", f'<div class="tokens">{chips}</div>'
    )


def chip(token: Token) -> str:
    return f'<span class="{token.kind}">{escape(token.text)}<small>{token.id}</small></span>'
