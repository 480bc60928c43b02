"""How the studio looks: colours, the seedling, page heads, empty states and the manners of its charts.

Streamlit's own theme (theme.toml) does most of it. What is here serves both a light and a dark page: colours of data
are chosen by the theme in use, and the few rules of CSS name none of their own.
"""
from __future__ import annotations

import html
import re
import textwrap
from pathlib import Path
from typing import Any

import altair as alt
import streamlit as st
from markdown_it import MarkdownIt

from mindseed.ui.mark import ICON, NAME, SEEDLING

THEME = Path(__file__).with_name("theme.toml")
LIGHT = ("#2563a8", "#d08a1e", "#1f8a5b", "#8a4fb8", "#c2445f", "#16838c", "#77701d", "#7c8590")
DARK = ("#68a6ec", "#e9ad4b", "#55c08d", "#b98ae0", "#ec8298", "#4cbcc5", "#bdb455", "#9aa3ad")
HEAT = {"light": ("#f6f4ee", "#a9d8bf", "#3f9f74", "#0f5c3a"), "dark": ("#1a1f24", "#1f5a41", "#3fae7a", "#c9f5de")}

CSS = """<style>
.stMainBlockContainer { padding: 3.2rem 3rem 3rem }
.stApp h1 { padding-top: 0; letter-spacing: -.015em }
[data-testid="stSidebarLogo"] { height: 2.2rem; margin: 0 }
[data-testid="stBottomBlockContainer"] { padding-left: 3rem; padding-right: 3rem }
[data-testid="stChatMessage"]:has([aria-label="Chat message from user"]) {
  background: color-mix(in srgb, currentColor 5%, transparent); padding-top: .6rem; padding-bottom: .6rem }
[data-testid="stChatMessage"] .stText { padding-top: .2rem }
[data-testid="stSidebarUserContent"] { padding-bottom: 1.5rem }
[class*="st-key-conversation_"] button, [class*="st-key-here_"] button { justify-content: flex-start; text-align: left;
  min-height: 2.1rem; padding: .2rem .6rem }
[class*="st-key-conversation_"] button p, [class*="st-key-here_"] button p { overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap }
[class*="st-key-conversation_"] button > div, [class*="st-key-here_"] button > div { min-width: 0; max-width: 100%;
  justify-content: flex-start }
[class*="st-key-here_"] button { background: color-mix(in srgb, currentColor 9%, transparent); font-weight: 600 }
[class*="st-key-actions_"] { opacity: .62; transition: opacity .15s }
[class*="st-key-actions_"]:hover, [class*="st-key-actions_"]:focus-within { opacity: 1 }
[class*="st-key-actions_"] button { min-height: 1.7rem; padding: 0 .35rem }
.seed-head { display: flex; align-items: baseline; gap: .8rem; flex-wrap: wrap }
.seed-soft { opacity: .68 }
.seed-empty { text-align: center; padding: 3.2rem 1rem 1.4rem; max-width: 46rem; margin: 0 auto }
.seed-empty img { width: 72px; height: 72px }
.seed-empty h3 { margin: .6rem 0 .2rem; padding: 0; font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em }
.seed-empty p { opacity: .72; margin: .2rem auto; line-height: 1.55 }
.seed-empty code { font-size: .85em; padding: .15em .4em; border-radius: 6px;
  background: color-mix(in srgb, currentColor 9%, transparent) }
.seed-tokens { line-height: 2.15; overflow-wrap: anywhere; font-size: 1.02rem; padding: .9rem 1rem; border-radius: 10px;
  border: 1px solid color-mix(in srgb, currentColor 14%, transparent) }
.seed-token { padding: .22em .06em; border-radius: 4px; margin-right: 1px; white-space: pre-wrap; cursor: default;
  background: color-mix(in srgb, var(--c) 27%, transparent); box-decoration-break: clone;
  -webkit-box-decoration-break: clone }
.seed-token:hover { background: color-mix(in srgb, var(--c) 60%, transparent) }
.seed-token i { font-style: normal; opacity: .45 }
.seed-token.raw, .seed-token.special { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .82em }
.seed-token.special { outline: 1.5px solid color-mix(in srgb, var(--c) 75%, transparent); outline-offset: -1px }
.seed-token.new { outline: 2px solid var(--c) }
.seed-step { display: flex; gap: .8rem; align-items: baseline; padding: .14rem 0; flex-wrap: wrap }
.seed-step b { font-weight: 500; opacity: .62; min-width: 7.5rem; font-size: .86rem;
  font-variant-numeric: tabular-nums }
.seed-caption { font-size: .8rem; opacity: .6; font-variant-numeric: tabular-nums }
.seed-word { font-size: .78rem; font-weight: 500; padding: .1em .55em; border-radius: 1em; margin-left: .5em;
  background: color-mix(in srgb, var(--c) 20%, transparent) }
.seed-dot { display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .45em }
[data-testid="stImage"] img { image-rendering: pixelated; border-radius: 6px }
[data-testid="stMetric"] { padding: 0 }
.seed-word { white-space: nowrap; display: inline-block }
.st-key-suggestions button p { white-space: normal }
[class*="st-key-title_"] [data-testid="InputInstructions"] { display: none }
[class*="st-key-heads"] [data-testid="stButtonGroup"] > div, [class*="st-key-heads"] [role="radiogroup"] {
  flex-wrap: wrap; overflow: visible }
@media (max-width: 1000px) {
  .stMainBlockContainer, [data-testid="stBottomBlockContainer"] { padding-left: 1.4rem; padding-right: 1.4rem }
  [class*="st-key-stack"] > [data-testid="stLayoutWrapper"] > [data-testid="stHorizontalBlock"],
  [class*="st-key-summary"] [data-testid="stHorizontalBlock"] { flex-wrap: wrap }
  [class*="st-key-stack"] > [data-testid="stLayoutWrapper"] > [data-testid="stHorizontalBlock"]
    > [data-testid="stColumn"] { min-width: 100% }
  [class*="st-key-summary"] [data-testid="stColumn"] { min-width: 6.5rem; flex: 1 1 6.5rem }
  [class*="st-key-summary"] [data-testid="stColumn"]:first-child { min-width: 100% }
  [class*="st-key-figures"] [data-testid="stHorizontalBlock"] { flex-wrap: wrap }
  [class*="st-key-figures"] [data-testid="stColumn"] { min-width: 30%; flex: 1 1 30% }
  [class*="st-key-thumbs"] [data-testid="stHorizontalBlock"] { flex-wrap: wrap }
  [class*="st-key-thumbs"] [data-testid="stColumn"] { min-width: 20%; flex: 0 1 20% }
}
[data-testid="stMetricLabel"] { opacity: .7 }
</style>"""
NARROW = """<style>
.stMainBlockContainer, [data-testid="stBottomBlockContainer"] { max-width: 56rem }
</style>"""

PARSER = MarkdownIt("commonmark").enable("table")
NOBODYS = re.compile("[\ufdd0-\ufdef]")          # characters that Unicode keeps free of meaning: ours for a moment
MARK, DOLLAR = "\ufdd0", "\ufddf"
MARKED = re.compile(rf"(\\*){MARK}([\ufdd1-\ufdda]+)")
FORMULA = re.compile(f"{DOLLAR * 2}[^{DOLLAR}`]+{DOLLAR * 2}|"
                     rf"{DOLLAR}(?!\d)(?:[^{DOLLAR}`\n]|\n(?!\s*\n))+{DOLLAR}(?!\d)")


def is_dark() -> bool:
    return st.context.theme.type == "dark"


def colours() -> tuple[str, ...]:
    """Of categories, for the page as it is now."""
    return DARK if is_dark() else LIGHT


def heat() -> list[str]:
    """From nothing to much."""
    return list(HEAT["dark" if is_dark() else "light"])


def logo() -> str:
    """The seedling and the name, in the ink of the page."""
    ink, inside = "#e6e8eb" if is_dark() else "#1d2126", SEEDLING.split(">", 1)[1].removesuffix("</svg>")
    dot = f'<circle cx="86.3" cy="12.2" r="2.3" fill="{ink}"/>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 206 48" width="206" height="48" fill="none">{inside}'
            f'<path d="{" ".join(NAME.split())}" stroke="{ink}" stroke-width="3.3" stroke-linecap="round" '
            f'stroke-linejoin="round"/>{dot}</svg>')


def head(title: str, what: str) -> None:
    """The title of a page and what it is for."""
    st.html(f'<div class="seed-head"><h1 style="font-size:1.7rem;margin:0;padding:0">{html.escape(title)}</h1>'
            f'<span class="seed-soft">{html.escape(what)}</span></div>')


def empty(title: str, *lines: str) -> None:
    """What stands on a page that has nothing to show; text in `backticks` is set as code."""
    paragraphs = "".join(f"<p>{with_code(line)}</p>" for line in lines)
    st.html(f'<div class="seed-empty"><img src="{ICON}" alt=""/><h3>{html.escape(title)}</h3>{paragraphs}</div>')


def with_code(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def plain(text: str) -> str:
    """Markdown of a text in which nothing is Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#$:~!|" else c for c in text)


def shown(text: str) -> str:
    """A model's words as Markdown. Pictures become links, since to load one would tell its host that it was shown;
    dollars that enclose no formula stay dollars; code is left as it is.

    The browser's parser knows more than CommonMark (formulas, footnotes, directives) and so might see text where ours
    sees code. That matters only if a picture could stand in the code: then the text around it loses what the two read
    differently, links and formulas among it.
    """
    text = NOBODYS.sub("\ufffd", textwrap.dedent(text).strip())                 # as st.markdown will do
    out = harmless(text, r"\$|!(?=\[)")
    if "![" in out and ("](" in out or "]:" in out):
        out = harmless(text, r"[$:<|\[]|(?<=[wW]{3})\.", careful=True)
    return out


def harmless(text: str, pattern: str, *, careful: bool = False) -> str:
    """Markdown in which the characters that `pattern` finds outside of code are entities, which no backslash undoes.

    To learn which ones are in code each is replaced by a number, spelt in characters that mean nothing, and the
    parser says where the numbers come to stand.
    """
    chars: list[str] = []

    def number(found: re.Match) -> str:
        chars.append(found[0])
        return MARK + "".join(chr(ord(MARK) + 1 + int(digit)) for digit in str(len(chars) - 1))

    def index(digits: str) -> int:
        return int("".join(str(ord(c) - ord(MARK) - 1) for c in digits))

    marked, code = re.sub(pattern, number, text), set()
    for token in PARSER.parse(marked) if chars else ():
        for piece in [token, *(token.children or ())]:
            inside = piece.type in ("fence", "code_block") or (
                piece.type == "code_inline" and not (careful and piece.content not in marked))   # not over line ends
            numbers = MARKED.finditer(f"{piece.info}\n{piece.content}") if inside else ()
            code |= {index(found[2]) for found in numbers}

    def restore(found: re.Match) -> str:
        slashes, i = found[1], index(found[2])
        if i in code:
            return slashes + chars[i]
        if len(slashes) % 2:                      # escaped already: the entity takes the place of both
            return f"{slashes[1:]}&#{ord(chars[i])};"
        return slashes + (DOLLAR if chars[i] == "$" and not careful else f"&#{ord(chars[i])};")

    out = FORMULA.sub(lambda found: found[0].replace(DOLLAR, "$"), MARKED.sub(restore, marked))
    return out.replace(DOLLAR, "&#36;")


def chart(layers: Any, *, height: int = 230, **kwargs: Any) -> None:
    """Draw with the manners of all our charts: no frame, thin grid, axes that do not shout."""
    layers = layers.properties(height=height).configure_view(strokeWidth=0).configure_axis(
        labelFontSize=11, titleFontSize=11, titleFontWeight="normal", domain=False, ticks=False, labelPadding=6)
    st.altair_chart(layers, width="stretch", **kwargs)


def heatmap_scale(low: float, high: float) -> alt.Scale:
    return alt.Scale(domain=[low, high], range=heat(), interpolate="rgb", clamp=True)
