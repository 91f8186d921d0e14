"""An evaluation as one HTML file that needs nothing beside it: tables, pictures, warnings."""

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from fastgn.analysis.tables import format_radius, wilson_interval
from fastgn.errors import check

NORMS = {"Linf": "L∞", "L2": "L2", "L1": "L1"}
VERDICTS = ("pass", "warn", "fail")
NONE = "–"
COLOURS = ("red", "green", "blue")
WORDS = {
    "images": "images analysed",
    "eps": "ε",
    "misclassified": "images that are wrong without an attack",
    "l1_mean": "mean L1 norm",
    "l1_mean_pgd10_fails": "mean L1 norm of images that withstand PGD-10",
    "l1_mean_pgd10_succeeds": "mean L1 norm of the other images",
    "pgd10_fails": "images that withstand PGD-10",
    "pgd10_succeeds": "images that do not",
    "l1_quantiles 0": "smallest L1 norm",
    **{f"l1_quantiles {q}": f"L1 norm, {q} % of the images are below" for q in (5, 25, 75, 95)},
    "l1_quantiles 50": "median L1 norm",
    "l1_quantiles 100": "largest L1 norm",
    **{f"channel_l1_mean {i}": f"mean L1 norm in {c}" for i, c in enumerate(COLOURS)},
    **{
        f"channel_signed_mean {i}": f"mean sum of the gradient in {c}"
        for i, c in enumerate(COLOURS)
    },
    "edge_correlation_mean": "mean correlation of the gradient's magnitude with the edges",
    "linearity uniform error": "error of the linear loss at random points (nats)",
    "linearity uniform relative_error": "the same over the mean change of the loss",
    "linearity pgd10 error": "error of the linear loss at PGD-10's points (nats)",
    "linearity pgd10 relative_error": "the same over the mean change of the loss under PGD-10",
    "cpu_count": "CPU cores",
    "gpus": "GPUs",
    "cuda": "CUDA",
    "batch_size": "images attacked at once",
    "ranks": "processes",
}
"""Keys of the record -> what a reader is told."""
ONE_PER_IMAGE = ("l1", "channel_l1", "edge_correlation")
"""Statistics that are lists over the images."""

# Dark colours are for screens alone, so that paper stays white. The policy forbids every request.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1d1d1b; --soft: #5c5c57; --rule: #d6d5ce;
  --pass: #1b6b3a; --warn: #855300; --fail: #b0271e;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #171816; --ink: #e9e8e3; --soft: #a9a8a1; --rule: #3b3c38;
    --pass: #7ccb98; --warn: #e3b45b; --fail: #ff9a8f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 62rem; padding: 3rem 1.5rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1, h2 {
  font-family: Charter, "Iowan Old Style", Palatino, "Palatino Linotype", Georgia, serif;
  font-weight: 600; line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere;
}
h1 { font-size: 2rem; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 0 0 .35rem; }
section { margin-top: 2.75rem; }
p { margin: 0 0 .5rem; max-width: 42rem; }
a { color: inherit; text-underline-offset: .2em; }
.facts {
  display: flex; flex-wrap: wrap; gap: .9rem 2.25rem; margin: 0 0 1rem; padding: .9rem 0;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule);
}
.facts dt { color: var(--soft); font-size: .8rem; line-height: 1.4; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--soft); outline-offset: 3px; }
table {
  border-collapse: collapse; margin-top: .6rem; font-size: .9375rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums;
  border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink);
}
th, td { padding: .5rem 0 .5rem 2rem; text-align: right; vertical-align: baseline; }
th { font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; padding-right: .5rem; text-align: left; }
thead th { border-bottom: 1px solid var(--ink); vertical-align: bottom; }
thead .model { display: inline-block; width: 11rem; font-weight: 600; overflow-wrap: break-word; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.numbers th:first-child { position: sticky; left: 0; background: var(--paper); }
.numbers td, .numbers tbody th { white-space: nowrap; }
.worst > * { font-weight: 600; }
small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
.texts { width: 100%; }
.texts td, .texts th { text-align: left; padding-left: 0; padding-right: 1.25rem; }
.texts td:last-child { width: 100%; padding-right: 0; overflow-wrap: anywhere; }
.texts tbody + tbody { border-top: 1px solid var(--ink); }
.texts .group { padding: .9rem 0 .5rem; font-weight: 600; overflow-wrap: anywhere; }
.texts .group small, .detail { font-size: .875rem; }
.detail { display: block; max-width: 44rem; color: var(--soft); }
.key { color: var(--soft); white-space: nowrap; }
.verdict { display: inline-block; min-width: 3.1rem; text-align: center; border: 1px solid; }
.verdict { font-size: .8125rem; font-weight: 600; line-height: 1.45; border-radius: 2px; }
.pass { color: var(--pass); border-color: var(--rule); }
.warn { color: var(--warn); border-color: var(--warn); }
.fail { color: var(--paper); background: var(--fail); border-color: var(--fail); }
figure { margin: 1rem 0 2rem; }
figcaption { margin-top: .45rem; color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
img { display: block; max-width: max(100%, 36rem); height: auto; background: #fff; }
ul { margin: .6rem 0 0; padding-left: 1.1rem; }
li { margin-bottom: .4rem; max-width: 44rem; overflow-wrap: anywhere; }
@media (max-width: 36rem) {
  body { padding: 1.75rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  section { margin-top: 2.25rem; }
  th, td { padding-left: .75rem; }
  thead .model { width: 7.5rem; }
}
@page { margin: 16mm; }
@media print {
  :root { color-scheme: light; --paper: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  .numbers th:first-child { position: static; }
  th, td { padding: .35rem 0 .35rem 1rem; }
  thead .model { width: 8rem; }
  tr, figure, li, .texts tbody { break-inside: avoid; }
  h2, .note { break-after: avoid; }
  img { max-width: 100%; max-height: 23cm; }
  .fail { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
</style>
</head>
<body>
<header>
<h1>$title</h1>
$summary
</header>
<main>
$sections
</main>
</body>
</html>
""")

Record = Mapping[str, Any]
Key = tuple[str, ...]


def html_report(record: Record, pictures: Mapping[str, bytes], *, title: str) -> str:
    """One self-contained HTML file of an evaluation: no script, no request to anywhere.

    `record` is evaluation.json; `pictures` are PNGs by their captions. A part that the record
    lacks is left out, heading and all; a value that one model of several lacks is a dash. Raises
    UserError where there are no models.
    """
    models = record.get("models", ())
    check(bool(models), "the record holds no models: nothing to report")
    parts = (
        accuracies(record, models),
        statistics(models),
        sanity(models),
        figures(pictures),
        warnings(models),
        about(record, models),
    )
    page = PAGE.substitute(
        title=escape(title),
        summary=summary(record, models),
        sections="\n".join(filter(None, parts)),
    )
    return page.encode(errors="replace").decode()  # names of files may hold half a surrogate pair


# ------------------------------------------------------------------------------- sections


def summary(record: Record, models: Sequence[Record]) -> str:
    radii = {r["eps"] for m in models for r in m["results"] if r["eps"]}
    facts = {
        "Images": "; ".join(unique(m["subset"] for m in models)),
        "n": ", ".join(unique(str(m["images"]) for m in models)),
        "Norm": norm(record),
        f"ε in {record.get('eps_units', '0..1 pixels')}": ", ".join(
            map(format_radius, sorted(radii))
        ),
        "Seed": str(record.get("seed", "")),
    }
    lines = [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v]
    failed = sum(s["verdict"] == "fail" for m in models for s in m.get("sanity") or ())
    warned = sum(len(m.get("warnings") or ()) for m in models)
    notes = []
    if failed:
        notes.append(f'<a href="#sanity">{plural(failed, "sanity check")} failed</a>')
    if warned:
        notes.append(f'<a href="#warnings">{plural(warned, "warning")}</a>')
    note = f"\n<p>Read first: {', '.join(notes)}.</p>" if notes else ""
    return f'<dl class="facts">{"".join(lines)}</dl>{note}'


def accuracies(record: Record, models: Sequence[Record]) -> str:
    columns: list[dict[Key, str]] = []
    worst: set[Key] = set()
    for model in models:
        column: dict[Key, str] = {}
        for result in model["results"]:
            clean = result["attack"] == "clean"
            key = (result["attack"], "" if clean else format_radius(result["eps"]))
            column[key] = score(result["accuracy"], model["images"])
            if result["attack"] == "worst case":
                worst.add(key)
        columns.append(column)
    # An attack that only a later model met still stands above the worst case, which sums up.
    rows = sorted(unique(key for c in columns for key in c), key=lambda key: key in worst)
    heads = [model_head(m, whole=True) for m in models]
    body = number_table("accuracy", ("attack", "ε"), rows, columns, heads, worst)
    note = f"{norm(record)} attacks. Small type: 95% Wilson interval of the accuracy."
    return section("accuracy", "Accuracy", body, note) if rows else ""


def statistics(models: Sequence[Record]) -> str:
    columns: list[dict[Key, str]] = [
        {(label(k),): value(v) for k, v in flat(m.get("statistics") or {}) if is_scalar(v)}
        for m in models
    ]
    rows = unique(key for column in columns for key in column)
    body = number_table("statistics", ("statistic",), rows, columns, map(model_head, models))
    return section("statistics", "Input gradients", body) if rows else ""


def flat(values: Record) -> Iterator[tuple[str, Any]]:
    """Nested values by their keys one after the other; of lists, those of up to 4 numbers."""
    for key, item in values.items():
        if isinstance(item, Mapping):
            yield from flat({f"{key} {inner}": x for inner, x in item.items()})
        elif isinstance(item, Sequence) and not isinstance(item, str):
            if len(item) <= 4 and key not in ONE_PER_IMAGE:
                yield from ((f"{key} {i}", x) for i, x in enumerate(item))
        else:
            yield key, item


def sanity(models: Sequence[Record]) -> str:
    groups = []
    for model in models:
        checks = model.get("sanity") or ()
        if not checks:
            continue
        counts = Counter(c["verdict"] for c in checks)
        count = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
        rows = "".join(f"<tr><td>{badge(c['verdict'])}</td><td>{told(c)}</td></tr>" for c in checks)
        head = f"{escape(model['name'])}<small>{escape(count)}</small>"
        groups.append(
            f'<tbody><tr><th class="group" colspan="2" scope="rowgroup">{head}</th></tr>'
            f"{rows}</tbody>"
        )
    body = f'<table class="texts">{"".join(groups)}</table>'
    return section("sanity", "Sanity of the evaluation", body) if groups else ""


def figures(pictures: Mapping[str, bytes]) -> str:
    body = "\n".join(
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}">'
        f'<img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, png in pictures.items()
    )
    return section("pictures", "Pictures", body) if pictures else ""


def warnings(models: Sequence[Record]) -> str:
    lines = [
        f"<li><strong>{escape(m['name'])}</strong>: {escape(str(text))}</li>"
        for m in models
        for text in m.get("warnings") or ()
    ]
    return section("warnings", "Warnings", f"<ul>{''.join(lines)}</ul>") if lines else ""


def about(record: Record, models: Sequence[Record]) -> str:
    seconds = sum(r.get("seconds") or 0 for m in models for r in m["results"])
    facts: dict[str, Any] = {"commit": record.get("commit")}
    facts |= record.get("hardware") or {}
    facts |= {name: record.get(name) for name in ("batch_size", "ranks")}
    facts["seconds of attacks"] = f"{seconds:,.1f}" if seconds else None
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items())
    rows = "".join(
        f'<tr><th class="key" scope="row">{escape(label(k))}</th><td>{escape(listed(v))}</td></tr>'
        for k, v in facts.items()
        if v not in (None, "", [])
    )
    body = f'<table class="texts"><tbody>{rows}</tbody></table>'
    return section("about", "How it was measured", body) if rows else ""


# ------------------------------------------------------------------------------- pieces


def section(name: str, heading: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return f'<section id="{name}">\n<h2 id="{name}-head">{heading}</h2>\n{note}{body}\n</section>'


def number_table(
    name: str,
    keys: Sequence[str],
    rows: Iterable[Key],
    columns: Sequence[Mapping[Key, str]],
    heads: Iterable[str],
    strong: Iterable[Key] = (),
) -> str:
    """Rows by their keys, a column of ready HTML a model, in a box that scrolls by itself."""
    strong = set(strong)
    above = "".join(f'<th scope="col">{head}</th>' for head in (*map(escape, keys), *heads))
    lines = []
    for key in rows:
        first, *rest = map(escape, key)
        cells = f'<th scope="row">{first}</th>' + "".join(f"<td>{text}</td>" for text in rest)
        cells += "".join(f"<td>{column.get(key, NONE)}</td>" for column in columns)
        kind = ' class="worst"' if key in strong else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-head">'
        f'<table class="numbers">\n<thead><tr>{above}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def model_head(model: Record, whole: bool = False) -> str:
    """The name; whole: with the architecture and the method below."""
    kinds = [breakable(str(model[k])) for k in ("model", "method") if model.get(k) and whole]
    small = "".join(f"<small>{kind}</small>" for kind in kinds)
    return f'<span class="model">{breakable(model["name"])}{small}</span>'


def breakable(name: str) -> str:
    """A name that a narrow column breaks after its underscores, not within a word."""
    return escape(name).replace("_", "_<wbr>")


def score(accuracy: float | None, n: int) -> str:
    if accuracy is None:
        return NONE
    low, high = wilson_interval(accuracy, n)
    return f"{accuracy:.1%}<small>{low * 100:.1f}–{high * 100:.1f}</small>"


def badge(verdict: str) -> str:
    """The word itself, so that colour is never needed."""
    kind = f" {verdict}" if verdict in VERDICTS else ""
    return f'<span class="verdict{kind}">{escape(verdict)}</span>'


def told(finding: Record) -> str:
    detail = escape(str(finding.get("detail") or ""))
    return escape(finding["name"]) + (f'<span class="detail">{detail}</span>' if detail else "")


def norm(record: Record) -> str:
    name = str(record.get("norm", "Linf"))
    return NORMS.get(name, name)


def label(key: str) -> str:
    """Returns a key in words: those of WORDS, else mean_l1_failed -> mean L1 failed."""
    upper = {"l1": "L1", "l2": "L2", "linf": "L∞", "cpu": "CPU"}
    spelled = " ".join(upper.get(word, word) for word in key.replace("_", " ").split())
    return WORDS.get(key, spelled)


def is_scalar(item: Any) -> bool:
    return item is None or isinstance(item, (str, bool, int, float))


def value(item: str | bool | int | float | None) -> str:
    if item is None:
        return NONE
    if isinstance(item, bool):
        return "yes" if item else "no"
    return escape(item if isinstance(item, str) else f"{item:.4g}" if item % 1 else f"{item:,.0f}")


def listed(item: Any) -> str:
    """A list with what is equal counted: 8 × NVIDIA H100."""
    if not isinstance(item, (list, tuple)):
        return str(item)
    counts = Counter(map(str, item)).items()
    return ", ".join(text if count == 1 else f"{count} × {text}" for text, count in counts)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def unique(items: Iterable[Any]) -> list[Any]:
    """In their first order."""
    return list(dict.fromkeys(items))
