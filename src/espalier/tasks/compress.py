"""`espalier compress source=RUN compression=[...]`: shrink a trained network, measure it against its source."""

from collections.abc import Iterator, Sequence

from espalier.composition import networks
from espalier.compression import sensitivity
from espalier.compression.base import Stage, methods, stage_of
from espalier.config.ranges import Count, NonNegative
from espalier.errors import ConfigError
from espalier.export import conclusions, deployed
from espalier.export.deployed import Artifact
from espalier.reporting import figures
from espalier.run import Run
from espalier.runs.checkpoint import Checkpoint, load
from espalier.spec import Report
from espalier.strategies.collective import is_first_rank


def compress(run: Run, max_drop: NonNegative, scan: bool, batches: Sequence[Count], threads: Count) -> Report:
    """Apply the recipe, fine-tune, export source and result to ONNX, and measure both on the whole test split.

    A drop of the learner's metric beyond `max_drop` is marked in the report. Ranks other than the first report no row.

    Raises:
        ConfigError: no source, or no recipe.
    """
    if run.source is None:
        raise ConfigError("source=null: compress needs the trained RUN that it shrinks; try source=latest")
    if not run.cfg.compression:
        raise ConfigError(f"compression=[]: nothing to do; say compression=[METHOD,...] with {', '.join(methods())}")
    run.record()
    notes = list(scan_source(run)) if scan and is_first_rank() else []
    weights = run.fit()
    if not is_first_rank():
        return run.publish([], ())
    assert weights is not None
    artifacts = list(export(run, run.source, load("source", weights)))
    test = run.data.loader("test", is_whole=True)
    rows = deployed.measure(artifacts, run.learner, test, batches, threads)
    metric = run.learner.monitor.replace("val/", "test/")
    notes.insert(0, conclusions.drop(rows[0], rows[-1], metric, run.learner.mode, max_drop))
    notes += conclusions.slower(rows[:-1], rows[-1])
    if Stage.MASK in stages(run):
        notes.append(conclusions.zeros(rows[-1], artifacts[-1]))
    if Stage.QUANTIZE in stages(run):
        final, in_float = artifacts[-1], artifacts[-2].trained
        forms = {"prepared": final.trained} | ({} if final.conversion else {"converted": final.converted})
        values = {form: deployed.score(network, run.learner, test)[metric] for form, network in forms.items()}
        growth = sensitivity.scan(in_float, run.data.samples(sensitivity.NUM_SAMPLES), run.loss, sensitivity.quantized)
        notes.append(conclusions.agreement(metric, {**values, final.runtime: rows[-1]["metrics"][metric]}))
        notes.append(conclusions.fusion(final))
        notes.append(f"8 bits cost most in {conclusions.most_sensitive(growth)}")
    return run.publish(rows, notes, deployed.ratios(rows[0], rows[-1]))


def stages(run: Run) -> set[Stage]:
    """Return the stages of the methods in the recipe."""
    return {stage_of(method.method) for method in run.compressions}


def export(run: Run, source: Checkpoint, result: Checkpoint) -> Iterator[Artifact]:
    """Yield the exported source and result.

    If the recipe cuts channels and quantizes, the cut network in float comes in between.
    """
    folder, spec, name = run.folder / "export", run.data.spec, deployed.name_of
    network = networks.trained(source)
    yield deployed.export(name(source.history), network, source.history, spec, folder / "source.onnx")
    if {Stage.STRUCTURE, Stage.QUANTIZE} <= stages(run):
        network, history = networks.in_float(result)
        yield deployed.export("the same in float", network, history, spec, folder / "float.onnx")
    network = networks.trained(result)
    yield deployed.export(name(result.history), network, result.history, spec, folder / "compressed.onnx")


def scan_source(run: Run) -> Iterator[str]:
    """Print and draw how sensitive the layers of the source are to the recipe; yield a remark per kind of harm."""
    harms = {"quantized": sensitivity.quantized} if Stage.QUANTIZE in stages(run) else {}
    if {Stage.STRUCTURE, Stage.MASK} & stages(run) or not harms:
        harms["pruned"] = sensitivity.pruned
    for harm, disturb in harms.items():
        growth = sensitivity.scan(run.model, run.data.samples(sensitivity.NUM_SAMPLES), run.loss, disturb)
        picture = run.folder / "figures" / f"sensitivity_{harm}.png"
        figures.sensitivity(growth, picture)
        run.say(f"growth of the loss, one layer at a time {harm}:\n{conclusions.ranking(growth)}")
        yield f"most sensitive to being {harm}: {conclusions.most_sensitive(growth)}; all: {picture.name}"
