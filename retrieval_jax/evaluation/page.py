"""A page of HTML, self-contained: its frame and style, and the tables in it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from retrieval_jax.core.storage import atomic_write
from retrieval_jax.evaluation.method_table import mark
from retrieval_jax.evaluation.significance import ALPHA, Difference


def write_page(
    path: str | os.PathLike,
    title: str,
    facts: Mapping[str, object],
    sections: Iterable[tuple[str, str]],
    footer: Mapping[str, str],
) -> None:
    """Writes a page of HTML, whole or not at all.

    Args:
      path: the file.
      title: the heading.
      facts: label -> value, under the heading.
      sections: heading and HTML of each section; one without HTML is left out.
      footer: label -> text.

    Raises:
      UserError: the path cannot be written.
    """
    page = _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        facts=_pairs(facts),
        sections="".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections if html),
        footer=_pairs(footer),
    )
    # Texts from the web hold halves of surrogate pairs, which UTF-8 cannot: "?" instead.
    atomic_write(path, page.encode("utf-8", "replace"))


def _pairs(pairs: Mapping) -> str:
    def text(value: object) -> str:
        return f"{value:,}" if type(value) is int else str(value)

    return "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(text(value))}</dd></div>"
        for name, value in pairs.items()
    )


def html_table(headings: Sequence[str], body: str) -> str:
    """Returns a table that scrolls where it is too wide, of headings (as text) and rows (as HTML)."""
    head = "".join(f"<th>{escape(heading).replace(chr(10), '<br>')}</th>" for heading in headings)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def difference_cell(found: Difference | None) -> str:
    """Returns the cell of a difference: its mean, its interval and its p-value, below each other."""
    if found is None:
        return "<td>–</td>"
    p = "p &lt; 0.001" if found.p_holm < 0.001 else f"p = {found.p_holm:.3f}"
    interval = f"{found.low:+.3f} to {found.high:+.3f}"
    return f"<td>{mark(found)}{found.mean:+.3f}<small>{interval}</small><small>{p}</small></td>"


def difference_note(baseline: str) -> str:
    """Returns what is to be said below a table of such cells, as text."""
    return (
        f"Means over the queries of the differences to {baseline}, their 95% confidence intervals (Student's "
        "t), and the p-values of paired randomisation tests, corrected by Holm–Bonferroni over the methods. "
        f"▲▼: p ≤ {ALPHA:g}."
    )


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><dl class="facts">$facts</dl></header>
<main>$sections</main>
<footer><dl>$footer</dl></footer>
</body>
</html>
""")

_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --card: #f7f7f5; --line: #dededa; --ink: #1d1d1b; --soft: #64645f;
  --bar: #0072b2; --good: #00795a; --good-ground: #e4f4ec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #161716; --card: #1f211f; --line: #383b38; --ink: #e8e8e4; --soft: #a0a29c;
    --bar: #56b4e9; --good: #5fd0a8; --good-ground: #16342a;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 82rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem); overflow-wrap: anywhere;
  background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 1rem; }
h3 { font-size: 1.1rem; margin: 0; }
h4 { font-size: 1rem; margin: 0 0 .5rem; }
dl, dd, figure, ul, ol { margin: 0; padding: 0; list-style: none; }
dt, small, summary, figcaption, thead, p { color: var(--soft); font-size: .85rem; font-weight: normal; }
dd, table { font-variant-numeric: tabular-nums; }
.facts, .legend { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.facts dd { font-size: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
tr { border-bottom: 1px solid var(--line); }
th, td { padding: .4rem .75rem; line-height: 2; text-align: right; white-space: nowrap; }
thead th { font-weight: normal; line-height: 1.3; vertical-align: bottom; }
th:first-child { position: sticky; left: 0; padding-left: 0; background: var(--ground); }
th:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.bar { background: linear-gradient(var(--bar), var(--bar)) 0 100% / var(--share) 3px no-repeat content-box; }
.differences small { display: block; line-height: 1.3; }
.differences td { line-height: 1.5; }
.differences td:nth-child(2), .differences th:nth-child(2) { text-align: right; }
.sweep td:nth-child(2), .sweep th:nth-child(2) { text-align: right; }
.sweep small { display: block; line-height: 1.3; white-space: normal; }
.sweep .failed { text-align: left; }
a { color: inherit; }
.found table { width: auto; min-width: 60%; }
.found td, .found th { line-height: 1.4; text-align: center; }
.found th:first-child { text-align: left; }
.found td:last-child { text-align: right; min-width: 12rem; }
.found i { color: var(--line); }
.legend li::before {
  content: ""; display: inline-block; width: 1.4em; height: 3px; margin-right: .5em;
  vertical-align: middle; background: var(--colour);
}
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.panels { margin: .75rem 0; }
.panels svg { width: 100%; max-width: 40rem; height: auto; }
.panels text { font-family: inherit !important; }
article { padding: 1.25rem; margin-bottom: 1.25rem; border-radius: .6rem; background: var(--card); }
article li { font-size: .9rem; }
article p { margin: .2rem 0 0; }
code { display: inline-block; font-size: .75rem; color: var(--soft); }
details { margin: .25rem 0 1rem; }
details li { margin-top: .5rem; padding-left: .75rem; border-left: 3px solid var(--good); }
.methods { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(13.5rem, 1fr); gap: 1rem; }
.methods li { display: flex; gap: .6rem; padding: .5rem; border-top: 1px solid var(--line); }
.methods li > span { color: var(--soft); }
.methods p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
.methods .relevant { background: var(--good-ground); box-shadow: inset 3px 0 var(--good); }
.relevant b::after { content: " \\2713"; color: var(--good); }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
footer div { display: grid; grid-template-columns: 7rem 1fr; gap: 1rem; }
footer dd { font: .8rem/1.6 ui-monospace, monospace; }
"""
