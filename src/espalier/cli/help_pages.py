"""Texts that the command line prints without running anything: overview, help, completion. Torch is never imported."""

from collections.abc import Sequence

from espalier.config import conf_dir
from espalier.errors import ConfigError
from espalier.runs.states import STATES

EXAMPLES = """\
  espalier train                                            a small residual network on handwritten digits, in a minute
  espalier compress source=latest experiment=digits_small   the same at a twentieth of its size, measured
  espalier export source=latest                             files for a runtime; then: espalier serve source=latest"""
FLAGS = """\
  -m, --multirun   one run per combination of the values in KEY=a,b,c
  --cfg job        print the composed configuration and stop
  --traceback      show where an error came from
  --version        print the versions of this program, of torch and of Lightning
  --help GROUP     the options of one group, a line each
  -sc install=bash print the shell code for tab completion: eval "$(espalier -sc install=bash)\""""


RUNS = "runs"  # a command that is no task
RUNS_SUMMARY = "List the runs below logs/, sort them by a metric, delete some."
YES = "--yes"
RUNS_KEYS = {
    "logs": "folder whose runs are listed [logs]",
    "task": "those of one task, such as train",
    "state": f"those of one state: {', '.join(STATES)}",
    "sort": "the best first by a metric, such as test/accuracy; or size, the largest first",
    "delete": "delete RUN,RUN or all that are failed, stopped or finished, after showing them",
}


def overview(tasks: Sequence[str]) -> str:
    """Return the tasks, a line each, and three examples."""
    lines = [f"  espalier {task:<10} {conf_dir.summary('task', task)}" for task in tasks]
    lines.append(f"  espalier {RUNS:<10} {RUNS_SUMMARY}")
    return "\n".join(["Tasks (`espalier TASK --help` for the rest):", *lines, "", "Examples:", EXAMPLES])


def help_page(verb: str, group: str) -> str:
    """Return groups, options and settings of a task, or the options of `group` with a line each."""
    groups = conf_dir.groups()
    if group in groups:
        lines = [f"  {group}={option:<20} {conf_dir.summary(group, option)}" for option in groups[group]]
        return "\n".join([f"Options of {group}:", *lines])
    task = verb.removeprefix("task=")
    chosen = conf_dir.defaults()
    settings = [f"  task.{line.replace(': ', '=', 1)}" for line in conf_dir.settings("task", task)]
    options = [
        f"  {name:<13} {', '.join(options)}"
        + (f"   [{chosen[name].strip('[]')}]" if chosen.get(name, "null") != "null" else "")
        for name, options in groups.items()
        if name not in ("task", "hydra")
    ]
    top = [f"  {line.replace(': ', '=', 1)}" for line in _top_level_lines()]
    return "\n".join(
        (
            f"espalier {task} [GROUP=OPTION] [KEY=VALUE] ...   {conf_dir.summary('task', task)}",
            *("", "Groups and their options, the default in brackets:", *options),
            *("", "Keys (`--cfg job` prints them all, such as model.width=32):", *top, *settings),
            *("", "Flags:", FLAGS),
        )
    )


def runs_page() -> str:
    """Return the help of `espalier runs`: its keys and flags."""
    keys = [f"  {key + '=':<9} {what}" for key, what in RUNS_KEYS.items()]
    flags = [f"  {YES}     delete without a question, where nobody can be asked"]
    return "\n".join([f"espalier {RUNS} [KEY=VALUE] ...   {RUNS_SUMMARY}", "", "Keys:", *keys, "", "Flags:", *flags])


def _top_level_lines() -> list[str]:
    lines = (conf_dir.CONF / "config.yaml").read_text().splitlines()
    return [line for line in lines if line and not line.startswith((" ", "#", "defaults"))]


def candidates(typed: Sequence[str], word: str, tasks: Sequence[str]) -> list[str]:
    """Return the completions of `word`: a task, an option of a group, or the name of a group or key."""
    if not typed:
        return [task for task in [*tasks, RUNS] if task.startswith(word)]
    if typed[0] == RUNS:
        return _of_runs(word, tasks)
    groups = conf_dir.groups()
    group, equals, start = word.rpartition("=")
    if equals:
        return [f"{group}={option}" for option in groups.get(group, []) if option.startswith(start)]
    from espalier.config import compose, hints

    overrides = [text if "=" in text else f"task={text}" for text in typed if "=" in text or text in tasks]
    try:
        composed = compose.compose(overrides)
    except ConfigError:  # an earlier word is wrong; the defaults help all the same
        composed = compose.compose()
    keys = [key for key in hints.keys(composed) if key.startswith(word)]
    level = word.count(".")  # one level of names at a time, as for folders
    names = {f"{name}=" for name in [*groups, *keys] if name.startswith(word) and name.count(".") == level}
    return sorted(names | {f"{key}." for key in _parents(keys) if key.count(".") == level})


def _of_runs(word: str, tasks: Sequence[str]) -> list[str]:
    key, equals, start = word.partition("=")
    values = {"state": STATES, "task": tasks}.get(key, ())
    whole = [f"{key}={value}" for value in values if value.startswith(start)]
    names = [*(f"{each}=" for each in RUNS_KEYS), YES]
    return whole if equals else [name for name in names if name.startswith(word)]


def _parents(keys: Sequence[str]) -> set[str]:
    return {key.rpartition(".")[0] for key in keys if "." in key}
