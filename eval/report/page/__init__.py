"""The report page: one HTML file that needs nothing else. The look and the behaviour lie beside this file."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path

from eval.report.page_data import Answers, page_data
from eval.report.page_html import comparisons, provenance, tables
from eval.report.report import Report
from eval.results.rows import Models
from eval.stats.gains import HV

HERE = Path(__file__).parent
SCRIPTS = ("base.js", "charts.js", "plots.js", "answers.js", "items.js")


def make_page(models: Models, report: Report, answers: Answers, title: str, most: int | None = None) -> str:
    """Return the page as HTML. `most`: how many items of a benchmark are shown at most (None: all).

    A policy in the page forbids every connection and every script and style but its own, by digest; what models wrote
    is packed, and shown as text alone.
    """
    data = page_data(models, report, answers, most)
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    chunks = "\n".join(
        f'<script type="application/gzip" id="chunk-{escape(name, quote=True)}">{text}</script>'
        for name, text in data.chunks.items()
    )
    parts = {
        "POLICY": policy,
        "STYLE": style,
        "TITLE": escape(title),
        "SUMMARY": escape(_summary(models, report)),
        "TABLES": tables(report),
        "COMPARISONS": comparisons(models, report),
        "PROVENANCE": provenance(models),
        "CORE": _safe_json(data.core),
        "CHUNKS": chunks,
        "SCRIPT": script,
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    pieces = page.split("@@")  # text, name, text, name, ..., so that nothing in a part is read as a name
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))


def _summary(models: Models, report: Report) -> str:
    """Return one sentence: numbers of models and merges, benchmarks, and significant changes of HV gain."""
    merges = sum(1 for f in models.families if f.unrelaxed)
    relaxed = sum(len(f.relaxed) for f in models.families)
    counts = ((len(models.sources), "source model"), (merges, "merge"), (relaxed, "relaxed merge"))
    counts_text = [f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count]
    paper = {row.key for f in models.families for row in f.relaxed}
    changes = [
        interval for (key, column), interval in report.uncertainty.changes.items() if column == HV and key in paper
    ]
    text = f"{', '.join(counts_text)}; {', '.join(models.columns)}"
    if not changes:
        return f"{text}{f'; no {HV} could be compared item by item' if relaxed else ''}."
    up, down = sum(low > 0 for low, _ in changes), sum(high < 0 for _, high in changes)
    return (
        f"{text}; with AIM {HV} is significantly higher for {up}, significantly lower for {down} and not significantly "
        f"different for {len(changes) - up - down} of the {len(changes)} relaxed merges that could be compared."
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _safe_json(value: object) -> str:
    """JSON without a character that means anything to HTML."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
