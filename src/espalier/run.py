"""One run, as tasks see it: fit, measure, publish. Its parts are composed in `composition/parts.py`."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hydra.utils import instantiate

from espalier.composition import networks, origin, plan, results, trainer
from espalier.composition.parts import Parts
from espalier.config.conf_dir import TRAINS
from espalier.errors import ConfigError, StoppedError
from espalier.learners import position
from espalier.optim.build import require_step
from espalier.processes import shortage
from espalier.processes.stop_signal import requeue
from espalier.profiling import cost
from espalier.reporting import terminal
from espalier.runs import checkpoint, run_folder
from espalier.runs.run_folder import RunFolder
from espalier.spec import Report
from espalier.strategies.collective import is_first_rank

terminal.hush_lightning()
log = logging.getLogger(__name__)


class Run(Parts):
    """One run: its parts, and what a task does with them. A task pays only for the parts it touches."""

    @property
    def has_trained(self) -> bool:
        """Return whether the run has taken a step, or resumes after one."""
        return "trainer" in self.__dict__ and self.trainer.global_step > 0

    def perform(self) -> float | None:
        """Carry out the task; return the objective of its report, which a sweep optimises.

        Raises:
            EspalierError: memory or disk did not suffice, or the training diverged.
        """
        try:
            with shortage.explained(self.folder, self.cfg.data):
                self._introduce()
                done = instantiate(self.cfg.task, _partial_=True)(self)
                return done.objective if isinstance(done, Report) else None
        except StoppedError:
            if self.cfg.requeue and is_first_rank():
                requeue()
            raise
        finally:
            for logger in self.__dict__.get("loggers", []):  # those that were built
                logger.close()

    def _introduce(self) -> None:
        """Say which files this starts from, and what it does otherwise than before."""
        for source in self.sources if self.task != "serve" else ():  # whose first line has the port
            self.say(f"source: {source.said}")
        if self.resumed is None:
            return
        self.say(f"resume: {self.resumed.said}")
        for line in origin.remarks(self.resumed, self.cfg, self.folder, lambda: self.trainer.world_size):
            self.say(line)

    def fit(self) -> Path | None:
        """Train, then apply what works on a trained network; the checkpoint of the result, None where none is kept.

        Compressing always keeps one. A recipe without a method that trains leaves the source's weights as they are.
        """
        late = [method for method in self.compressions if not method.trains]
        weights = None
        if self.task == "train" or len(late) < len(self.compressions):
            if is_first_rank():
                RunFolder(self.folder).report.unlink(missing_ok=True)  # of the run that this one goes on from
            self.trainer.fit(self.learner, self.data, ckpt_path=self.resumed.path if self.resumed else None)
            weights = trainer.kept(self.trainer) or self.learner.save_last()
        if not late and (weights or self.task == "train"):
            return weights
        if weights:
            checkpoint.load_weights(self.learner.model, checkpoint.load("source", weights))
        for method in late:
            self.learner.model, entry = method.apply_to(self.learner.model)
            self.history.append(entry)
        weights = RunFolder(self.folder).compressed
        if is_first_rank():
            self.checkpoint_io.save_network(self.learner.model, weights)
        return weights

    def measure(self, split: Literal["train", "val", "test"], weights: Path | None = None) -> dict[str, float]:
        """Return the metrics of a whole split, named `split/...`, with a checkpoint's weights or the present ones."""
        self.data.tested_split = split
        [values] = self.trainer.test(self.learner, self.data, ckpt_path=weights, verbose=False)
        return {name.replace("test/", f"{split}/"): value for name, value in values.items()}

    @property
    def monitored(self) -> dict[str, Any] | None:
        """Return name, direction and value of the metric that the best checkpoint was chosen by, or None."""
        return trainer.monitored(self.trainer)

    def cost(self, weights: Path | None) -> dict[str, Any]:
        """Name, runtime and counted cost of the network in a checkpoint file, or of the present one."""
        model = networks.trained(checkpoint.load("source", weights)) if weights else self.learner.model
        return {
            "name": str(self.cfg.model._target_).rpartition(".")[2],
            "runtime": "torch",
            **cost.counts(model, self.data.spec),
            **({"size_bytes": cost.size_bytes(weights)} if weights else {}),
        }

    def record(self) -> None:
        """Write down what this run is made of: config, overrides, provenance."""
        _ = self.trainer  # built first: a run that cannot be built leaves nothing behind
        self._announce()
        for logger in self.loggers:
            logger.log_hyperparams(self.plain_config())
        if not is_first_rank():
            return
        results.record(self.folder, self.plain_config(), self.words, is_resumed=self.resumed is not None)

    def _announce(self) -> None:
        """Say what is about to be trained, and what is odd about it.

        Raises:
            ConfigError: nothing would be trained, or nothing measured.
        """
        if self.task == "evaluate":
            plan.require_test(self.trainer, self.data, str(self.cfg.task.split))
        if self.task not in TRAINS:
            return
        place = f"run folder: {run_folder.from_here(self.folder)}"  # a resumed run has named it already
        if self.task != "train" and not any(method.trains for method in self.compressions):
            self.say(place)
            return
        try:
            require_step(self.learner.optimizer_factory, self.learner.model)
        except ValueError as error:
            raise ConfigError(f"optimizer: {error}") from error
        before = position.finished(self.resumed.content) if self.resumed else (0, 0)
        planned = plan.of_training(self.trainer, self.data, is_tested=self.task == "train", finished=before)
        if self.resumed is None:
            self.say(place)
        self.say(plan.line(planned, self.trainer, self.data.spec))
        for warning in planned.warnings if is_first_rank() else ():
            log.warning(warning)

    def publish(
        self, rows: list[dict[str, Any]], notes: Sequence[str], ratios: dict[str, float] | None = None
    ) -> Report:
        """Report what was measured: files, figures, loggers, and the table that the user sees.

        What is no result is stored without the metric that its checkpoint was chosen by, so nothing compares it.
        """
        source = str(self.sources[0].path) if self.sources else None
        found = self.data.notes if "data" in self.__dict__ else []
        warnings = [f"no result: {self.cfg.no_result}"] if self.cfg.no_result else []
        chosen = self.monitored if self.has_trained else None
        said = [*warnings, *notes, *found]
        done = Report(self.task, str(self.folder), source, self.cfg.seed, rows, ratios or {}, said, chosen)
        if is_first_rank():
            kind = self.learner.kind if "learner" in self.__dict__ else None
            tables = self.learner.measured.get("test", {}) if kind else {}
            tables = {name.removeprefix("test/"): table for name, table in tables.items()}
            stored = replace(done, monitored=None) if warnings else done
            results.draw(stored, self.folder, tables, kind)
            results.publish(stored, self.folder, self.loggers, self.data.spec.name if "data" in self.__dict__ else "")
            if self.has_trained:
                trainer.discard_stopped(self.trainer)
        return done
