"""Train, compress, measure and ship neural networks."""

from typing import TYPE_CHECKING, Any

from espalier.processes.telemetry import switch_off

switch_off()  # here, because every part of the package is imported after this line

if TYPE_CHECKING:
    from espalier.api.answers import Answers
    from espalier.api.loading import Loaded, load
    from espalier.api.training import train
    from espalier.errors import ConfigError, EspalierError

    __version__: str

HOMES = {  # of what users import from here; each is imported when it is asked for
    "Answers": "espalier.api.answers",
    "Loaded": "espalier.api.loading",
    "load": "espalier.api.loading",
    "train": "espalier.api.training",
    "ConfigError": "espalier.errors",
    "EspalierError": "espalier.errors",
}
__all__ = ["Answers", "ConfigError", "EspalierError", "Loaded", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import a part of the Python interface at its first use, so that `import espalier` stays quick."""
    if name == "__version__":
        from importlib.metadata import version

        return version("espalier")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    """List the lazy names as well, for completion in a notebook."""
    return sorted({*globals(), *__all__})
