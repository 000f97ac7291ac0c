"""A report as one self-contained page: no network, no script, light and dark, phone and print."""

from __future__ import annotations

from reports import formats, plots
from reports.table import Column, Report, TaskScore

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ report.recipe }} · kfuse</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff;
  --band: #f6f8fa; --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --band: #151b23; --good: #3fb950; --bad: #f85149; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 68rem; padding: 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
p.verdict { font-size: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { background: var(--band); white-space: nowrap; }
td small, th small { display: block; color: var(--soft); font-weight: normal; }
.better { color: var(--good); } .worse { color: var(--bad); }
.gap { color: var(--soft); font-style: italic; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
pre { background: var(--band); padding: 1rem; overflow-x: auto; font-size: .85rem; }
code { overflow-wrap: anywhere; font-size: .85rem; }
@media print { body { max-width: none; } h2 { break-after: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ report.recipe }}</h1>
<p class="verdict">{{ headline }}</p>
<p>{{ sign | capitalize }}. Intervals are 95 %; verdicts hold at 5 % after Holm's correction over all
comparisons of this page. What is random here is the draw of questions: a second training differs, too.</p>

<h2 id="scores">Scores and gains</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="scores"><table>
<thead><tr><th scope="col">row</th>
{%- for column in report.columns %}<th scope="col">{{ column.name }}<small>{{ direction(column) }}
{%- if partial(column) %}<br>{{ partial(column) }}{% endif %}</small></th>{% endfor %}</tr></thead>
<tbody>
{%- for row in report.rows %}
<tr><th scope="row">{{ row.name }}<small>{{ row.kind }}</small></th>
{%- for column in report.columns %}{% set cell = report.cell(row.name, column.name) %}
{%- if cell.reason %}<td class="gap" title="{{ cell.reason }}">not measured</td>
{%- else %}<td title="{{ cell.signature }}">{{ score(cell, column) }}
<small class="{{ cell.gain.verdict if cell.gain else '' }}">{{ gain(cell, column) }}</small></td>{% endif %}
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{% if power %}<p>The smallest gain that these items show with 80 % power: {{ power | join("; ") }}.</p>{% endif %}
{% if gaps %}<h3>Not measured</h3><ul>{% for text in gaps %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}

<h2>Gains over {{ report.reference }}</h2>
{% for column, svg in forests %}<figure><figcaption>{{ column.title }}</figcaption>{{ svg | safe }}</figure>
{% else %}<p>Nothing to compare yet.</p>{% endfor %}

{% if curves %}<h2>Training</h2><figure>{{ curves | safe }}</figure>{% endif %}

<h2 id="tasks">Tasks</h2>
{% for column in report.columns %}
<details{% if loop.first %} open{% endif %}><summary>{{ column.title }}</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Tasks of {{ column.name }}"><table>
<thead><tr><th scope="col">task</th>{% for row in report.rows %}<th scope="col">{{ row.name }}</th>{% endfor %}</tr></thead><tbody>
{%- for name, scores in tasks(column) %}<tr><th scope="row">{{ name }}</th>
{%- for task in scores %}<td{% if task %} title="{{ task.signature }}"{% endif %}>
{%- if task and task.score is not none %}{{ number(task.score, column) }}<small>n {{ task.n }}</small>{% else %}–{% endif %}</td>{% endfor %}</tr>
{%- endfor %}</tbody></table></div></details>
{% endfor %}

<h2 id="health">Health and cost</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="health"><table>
<thead><tr><th scope="col">row</th><th scope="col">suite</th><th scope="col">items</th><th scope="col">truncated</th>
<th scope="col">no answer found</th><th scope="col">ties</th><th scope="col">infrastructure</th>
<th scope="col">seconds</th><th scope="col">tokens read</th></tr></thead><tbody>
{%- for cell in measured %}{% set health = dict(cell.health) %}{% set cost = dict(cell.cost) %}
<tr><th scope="row">{{ cell.row }}</th><td>{{ cell.suite }}</td><td>{{ cell.n }} of {{ cell.n_total }}</td>
<td>{{ health.truncated or 0 }}</td><td>{{ health.unextracted or 0 }}</td><td>{{ health.tie or 0 }}</td>
<td>{{ health.infra or 0 }}</td><td>{{ "%.1f" | format(cost.seconds or 0) }}</td><td>{{ "{:,}".format(cost.tokens | default(0) | int) }}</td></tr>
{%- endfor %}</tbody></table></div>
<div class="scroll"><table><caption>What building took</caption>
<thead><tr><th scope="col">row</th><th scope="col">how it is made</th><th scope="col">seconds</th><th scope="col">of that its sources' distributions</th><th scope="col">tokens</th></tr></thead><tbody>
{%- for row in report.rows %}{% set cost = row.cost or {} %}
<tr><th scope="row">{{ row.name }}</th><td>{{ row.summary }}</td><td>{{ "%.1f" | format(cost.seconds) if cost.seconds is defined else "–" }}</td>
<td>{% if row.captures %}+ {{ "%.1f" | format(row.captures | map(attribute="cost") | map(attribute="seconds", default=0) | sum) }}{% else %}–{% endif %}</td>
<td>{{ "{:,}".format(cost.tokens | int) if cost.tokens else "–" }}</td></tr>
{%- endfor %}</tbody></table></div>

<h2>Provenance</h2>
<p>{{ facts.machine }} · {{ facts.created }} · commit <code>{{ facts.commit or "unknown" }}</code><br>
{% for name, version in (facts.packages or {}).items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>
<details><summary>Recipe</summary><pre>{{ report.recipe_yaml }}</pre>
{% if report.overrides %}<p>Overrides: {% for o in report.overrides %}<code>{{ o }}</code> {% endfor %}</p>{% endif %}</details>
<details><summary>Signatures</summary><ul>{% for cell in measured %}<li><code>{{ cell.signature }}</code></li>{% endfor %}</ul></details>
</main>
</body>
</html>
"""


def page(report: Report) -> str:
    """The page; every text in it is escaped, whatever names and outputs hold."""
    from jinja2 import Environment

    drawn = [(column, plots.forest(report, column)) for column in report.columns]

    def tasks(column: Column) -> list[tuple[str, list[TaskScore | None]]]:
        cells = [report.cell(row["name"], column.name) for row in report.rows]
        names = {task.task: task.title for cell in cells for task in cell.tasks}
        return [
            (title, [next((t for t in cell.tasks if t.task == name), None) for cell in cells])
            for name, title in names.items()
        ]

    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        report=report,
        facts=report.facts,
        headline=formats.headline(report),
        sign=formats.SIGN,
        direction=lambda c: formats.heading(c).removeprefix(c.name).strip(" ()"),
        partial=lambda c: formats.partial_text(report, c),
        score=formats.score_text,
        gain=lambda cell, column: formats.gain_text(cell, column, report.reference),
        number=formats.number,
        power=[text for c in report.columns if (text := formats.power(report, c))],
        gaps=formats.reasons(report),
        forests=[(column, svg) for column, svg in drawn if svg],
        curves=plots.training(report),
        tasks=tasks,
        measured=[cell for cell in report.cells.values() if not cell.reason],
        dict=dict,
    )
