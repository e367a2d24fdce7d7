"""`espalier report source=RUN[,RUN...]`: compare finished runs, and say which of them are worth their cost."""

from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.reporting import comparison, figures, page, pareto, terminal
from espalier.reporting import report as tables
from espalier.run import Run
from espalier.runs import references
from espalier.runs.run_folder import RunFolder
from espalier.spec import Report

PAGE_NAME = "report.html"


def report(run: Run, metric: str | None, batch: Count | None) -> Report:
    """Compare runs: configuration, metrics, cost, latency and Pareto front, as tables and as one HTML page.

    Trains and measures nothing: every number comes from the `report.json` of a run.

    Raises:
        ConfigError: no source, one that is no finished run, or a metric or batch size that no run has.
    """
    if not run.cfg.source:
        raise ConfigError("source=null: report needs finished RUNs, such as source=RUN,RUN; try source=latest")
    folders = [RunFolder.of(references.find("source", each)).path for each in references.split(run.cfg.source)]
    entries = comparison.read("source", folders)
    rows = comparison.rows(entries)
    metric = _choice("metric", metric, [name for row in rows for name in row.get("metrics", {})])
    size = _choice(
        "batch", None if batch is None else str(batch), [name for row in rows for name in row.get("latency_ms", {})]
    )
    metric, size = metric or comparison.metric_of(rows), size or comparison.batch_of(rows)
    points = pareto.points(rows, metric, size) if metric else []
    means, ranges = comparison.means(entries)
    notes = [*ranges, *comparison.cautions(entries)]
    run.folder.mkdir(parents=True, exist_ok=True)
    if metric and len(points) > 1:
        notes = [*pareto.verdicts(points, metric, size), *notes]
        pareto.pareto(points, metric, size, run.folder / "figures" / "pareto.png")
    figures.learning(comparison.logs(entries), run.folder / "figures" / "learning.png")
    differing = comparison.differences(entries)
    if differing:
        terminal.console().print(tables.grid_of(differing))
    done = run.publish(rows + means, notes)
    metrics, costs = tables.columns_of(done)
    measured = metrics | costs
    title = ", ".join(entry.name for entry in entries)
    (run.folder / tables.MARKDOWN_NAME).write_text(
        page.markdown(title, entries, measured, differing, done), encoding="utf-8"
    )
    text = page.html(title, entries, measured, differing, done, run.folder / "figures")
    (run.folder / PAGE_NAME).write_text(text, encoding="utf-8")
    run.say(f"page: {run.folder / PAGE_NAME}")
    return done


def _choice(key: str, value: str | None, measured: list[str]) -> str | None:
    """Return the value, if any run has it.

    Raises:
        ConfigError: no run has it.
    """
    if value is not None and value not in measured:
        known = ", ".join(dict.fromkeys(measured)) or "none"
        raise ConfigError(f"task.{key}={value}: none of these runs measured it; they have {known}")
    return value
