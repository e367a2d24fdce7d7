"""The names of the files in a run folder."""

from dataclasses import dataclass
from pathlib import Path

LOGS = Path("logs")
CHECKPOINTS = "checkpoints"  # the folder of them in that of a run
LAST = "last.ckpt"  # what a run resumes from
PREVIOUS = "previous.ckpt"  # the one before it, should it be damaged
BEST = "BEST"  # the file that names the best checkpoint beside it; in a list of names: that checkpoint
MAX_NAME = 200  # bytes of it that are read
UNRECORDED = "best.ckpt"  # what it is called where nothing names it
RESUMED = (LAST, PREVIOUS)
COMPRESSED = "compressed.ckpt"  # the best one after the methods that work on a trained network
EVALUATED = (COMPRESSED, BEST, *RESUMED)  # what `source=FOLDER` means, in this order
BUNDLE = Path("export", "bundle.json")  # in the folder of a run that exported
TAKES_SEVERAL = ("benchmark", "report")  # tasks whose source may be RUN,RUN,...
TAKES_BUNDLE = ("predict", "serve")  # tasks that need an exported bundle
NOT_THE_DATA = ("batch_size", "num_workers", "in_memory", "augment")  # settings of data that change no sample
READS_BUNDLE = ("benchmark", "evaluate")  # tasks that take one as well as a checkpoint


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; it alone knows the names of the files in it."""

    path: Path

    @classmethod
    def of(cls, path: Path) -> "RunFolder":
        """Return the folder that a file of a run, or an exported bundle, belongs to; any other folder stays itself."""
        if path.is_dir():
            is_bundle = path.name == BUNDLE.parent.name and (path / BUNDLE.name).is_file()
            return cls(path.parent if is_bundle else path)
        return cls(path.parent.parent if path.parent.name == CHECKPOINTS else path.parent)

    @property
    def report(self) -> Path:
        """Return the file of the measurements, which is written last."""
        return self.path / "report.json"

    @property
    def config(self) -> Path:
        """Return the file of the run's configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def last(self) -> Path:
        """Return the checkpoint that the run resumes from."""
        return self.checkpoints / LAST

    @property
    def compressed(self) -> Path:
        """Return the best checkpoint after the methods that work on a trained network."""
        return self.checkpoints / COMPRESSED

    @property
    def can_go_on(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return any((self.checkpoints / name).is_file() for name in RESUMED)


def from_here(folder: Path) -> Path:
    """Return the folder as it is printed: relative to the current one if it lies below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def best_in(checkpoints: Path) -> Path | None:
    """Return the best checkpoint of a folder, as recorded when it was saved; None if none is recorded."""
    record = checkpoints / BEST
    named = Path(record.read_bytes()[:MAX_NAME].decode(errors="replace").strip() if record.is_file() else UNRECORDED)
    inside = named.name if named.is_absolute() or ".." in named.parts else named
    return next((path for path in (checkpoints / inside, checkpoints / UNRECORDED) if path.is_file()), None)
