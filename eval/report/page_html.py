"""The parts of the report page that are there without JavaScript: tables, comparisons, how it was run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from eval.report.comparison_text import shown_p, verdict
from eval.report.report import SIGNIFICANT, Cell, Line, Report, Table
from eval.report.tables import OVER, as_printed, over, shown_label
from eval.results.conditions import SHARED
from eval.results.rows import Models
from eval.stats.comparison import Difference
from eval.stats.gains import HV
from eval.stats.significance import Interval


def tables(report: Report) -> str:
    """The tables, source models first, with what stands below them."""
    tables_shown = [*([report.sources] if report.sources else []), *report.methods]
    parts = [_table(report, table, sources=table is report.sources) for table in tables_shown]
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.note.split("\n\n") if note)
    return "\n".join([*parts, f'<div class="notes">{notes}</div>'])


def _table(report: Report, table: Table, sources: bool) -> str:
    one = len({frozenset(line.population or ()) for line in table.lines}) == 1
    names = [*report.columns, *([] if sources else [HV])]
    heads = ["Model(s)", *([] if sources else ["AIM"])]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    for name in names:
        sortable = name != HV or one
        why = "" if sortable else ' title="Gains over different populations do not compare."'
        button = f'<button type="button" class="sort">{escape(name)}</button>' if sortable else escape(name)
        head += f'<th scope="col" class="n"{why}>{button}</th>'
    head += "" if sources else f'<th scope="col">{OVER}</th>'
    body = "\n".join(_row(report, line, sources) for line in table.lines)
    title = escape(table.title)
    return (
        f'<h3>{title}</h3>\n<div class="wide" tabindex="0" role="region" aria-label="{title}"><table class="scores">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _row(report: Report, line: Line, sources: bool) -> str:
    cells = line.cells[:-1] if sources else line.cells
    name = f'<th scope="row">{escape(shown_label(line, report))}<span class="sub">{escape(line.row.name)}</span></th>'
    aim = "" if sources else f"<td>{escape(line.aim)}</td>"
    cell_over = "" if sources else f"<td>{escape(over(line))}</td>"
    kind = "source" if sources else "aim" if line.row.lineage.omega is not None else "plain"
    return f'<tr class="{kind}">{name}{aim}{"".join(map(_cell, cells))}{cell_over}</tr>'


def _cell(cell: Cell) -> str:
    if cell.value is None:
        return '<td class="n" data-v="">-</td>'
    number = f"<b>{cell.number}</b>" if cell.lead else cell.number
    interval = f'<span class="ci">{as_printed(cell, 0)} to {as_printed(cell, 1)}</span>' if cell.interval else ""
    change = ""
    if cell.change:
        way = "" if cell.better is None else " up" if cell.better else " down"
        sign = f'<abbr title="statistically significant">{SIGNIFICANT}</abbr>' if cell.is_significant else ""
        sure = " sure" if cell.is_significant else ""
        change = f'<span class="change{way}{sure}">{escape(cell.change)}{sign}</span>'
    return f'<td class="n" data-v="{cell.value!r}">{number}{change}{interval}</td>'


def comparisons(models: Models, report: Report) -> str:
    """Each AIM row beside its merge: every benchmark's difference, interval and verdict."""
    parts = []
    for family in models.families:
        for row in (*family.relaxed, *family.variants):
            differences = report.uncertainty.differences.get(row.key)
            if differences and family.unrelaxed:
                omega = "" if row.lineage.omega is None else f" at omega {row.lineage.omega:g}"
                title = f"{family.method}, {family.label}: {row.lineage.variant or 'AIM'}{omega}"
                gain = report.uncertainty.changes.get((row.key, HV))
                values = [report.gains.values.get(r.key) for r in (row, family.unrelaxed)]
                change = None if None in values else (values[0] or 0.0) - (values[1] or 0.0)
                badge_text, is_changed = _badge(differences, change, gain)
                kind = escape(row.lineage.variant or "AIM")
                names = f"{escape(family.unrelaxed.name)} (without) and {escape(row.name)} (with {kind})"
                parts.append(
                    f'<details class="card"><summary><span>{escape(title)}</span> '
                    f'<span class="badge{" sure" if is_changed else ""}">{badge_text}</span></summary>'
                    f"{_forest(differences)}{_gain(change, gain)}"
                    f'<p class="sub">{names}</p></details>'
                )
    if not parts:
        return "<p>There is no AIM row with outcomes per item to compare with its merge.</p>"
    return "\n".join(parts)


def _badge(differences: Sequence[Difference], change: float | None, gain: Interval | None) -> tuple[str, bool]:
    """Return the summary of a comparison as HTML, HV gain included, and True where a difference is significant."""
    parts = [(f"{d.column} {d.value:+.2f}", _way(d.value, d.higher_is_better)) for d in differences if d.is_significant]
    is_known = change is not None and gain is not None
    if change is not None and gain is not None and not gain[0] <= 0 <= gain[1]:
        parts.append((f"{HV} {change:+.3f}", _way(change, True)))
    if parts:
        return ", ".join(f'<span class="{way}">{escape(text)}</span>' for text, way in parts), True
    return f"no significant difference{f', {HV} included' if is_known else ''}", False


def _way(value: float, higher_is_better: bool | None) -> str:
    """The class of a gain or a loss."""
    return "" if higher_is_better is None else "up" if (value > 0) == higher_is_better else "down"


def _gain(change: float | None, gain: Interval | None) -> str:
    """A sentence on the difference of HV gains."""
    if change is None or gain is None:
        return f"<p>{HV}: the two gains could not be compared item by item.</p>"
    verdict_text = "not significant" if gain[0] <= 0 <= gain[1] else "statistically significant"
    return f"<p>{HV}: {change:+.3f}, 95 % interval {gain[0]:+.3f} to {gain[1]:+.3f}, {verdict_text}.</p>"


def _forest(differences: Sequence[Difference]) -> str:
    reach = max(1.0, *(abs(end) for d in differences for end in d.interval)) * 1.05
    rows = []
    for d in differences:
        low, high, at = (50 + 50 * value / reach for value in (*d.interval, d.value))
        shape = (
            f'<svg class="forest" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">'
            f'<line class="zero" x1="50" x2="50" y1="0" y2="16"/>'
            f'<line class="span" x1="{low:.2f}" x2="{high:.2f}" y1="8" y2="8"/>'
            f'<rect class="dot" x="{at - 0.8:.2f}" y="4" width="1.6" height="8"/></svg>'
        )
        counts = "" if d.only_a is None else f"{d.only_a} / {d.only_b}"
        sure = f' class="sure {_way(d.value, d.higher_is_better)}"' if d.is_significant else ""
        verdict_text = verdict(d).replace("B ", "AIM ")
        interval = f"{d.interval[0]:+.2f} to {d.interval[1]:+.2f}"
        least = "none" if d.detectable is None else f"{d.detectable:.2f}"
        numbers = [str(d.n), f"{d.value:+.2f}", interval, None, least, counts, escape(shown_p(d.corrected))]
        cells = "".join(f"<td>{shape}</td>" if text is None else f'<td class="n">{text}</td>' for text in numbers)
        rows.append(f'<tr{sure}><th scope="row">{escape(d.column)}</th>{cells}<td>{verdict_text}</td></tr>')
    heads = (
        *("", "items", "difference", "95 % interval", "", "detectable", "only without / only with", "p corrected"),
        "verdict",
    )
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


SETTINGS = (*SHARED, "limit", "num_fewshot", "math_prompt_type", "math_max_tokens", "seed")


def provenance(models: Models) -> str:
    """Return a table of the weights, settings and versions behind each measured row."""
    measured = [row for row in models.rows if not row.published]
    entries: list[dict[str, Any]] = []
    for row in measured:
        result = row.result
        entry: dict[str, Any] = {"digest": (result.digest or "").removeprefix("sha256:")[:12]}
        entry |= {name: result.settings.get(name) for name in SETTINGS}
        entry |= {f"{name} version": version for name, version in result.versions.items()}
        entry["minutes"] = f"{result.seconds['total'] / 60:.1f}" if "total" in result.seconds else None
        entries.append(entry)
    every = dict.fromkeys(n for e in entries for n in e)
    names = [n for n in every if any(e.get(n) not in (None, "", False, {}) for e in entries)]
    if not measured:
        return "<p>All rows are the paper's.</p>"
    head = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{escape(row.model)}</th>'
        + "".join(f"<td>{escape('' if entry.get(n) is None else str(entry[n]))}</td>" for n in names)
        + "</tr>"
        for row, entry in zip(measured, entries, strict=True)
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
