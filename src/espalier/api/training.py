"""`espalier.train`: the command of the same name, from a script or a notebook."""

from espalier.api.loading import Loaded, load
from espalier.cli import program
from espalier.errors import ConfigError


def train(*words: str) -> Loaded:
    """Train as `espalier train WORDS` does, below `logs/` of the current folder, and load the run.

    Ctrl-C during the training stops it after the present step, and raises; before and after it works as always.

    Raises:
        ConfigError: the words describe no training.
        EspalierError: the training failed, diverged (`DivergedError`) or was stopped (`StoppedError`).
    """
    for word in words:
        _require_override(word)
    return load(program.run(["task=train", *words]))


def _require_override(word: object) -> None:
    if not isinstance(word, str):
        raise ConfigError(f"train({word!r}): takes the words of the command as texts, such as 'model=cnn'")
    if word.startswith("-"):
        raise ConfigError(f"train({word!r}): a flag of the command line; train takes GROUP=OPTION and KEY=VALUE")
    if word.startswith("task=") or not ("=" in word or word.startswith("~")):
        raise ConfigError(f"train({word!r}): takes GROUP=OPTION and KEY=VALUE; other tasks are for the command line")
