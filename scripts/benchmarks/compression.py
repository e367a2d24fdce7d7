"""What compression costs and gains: recipes on digits over five seeds, a network of 1.2 M parameters, today's tools.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmarks/compression.py digits [--seeds 0 1 2 3 4] [--recipes qat ptq]
    OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmarks/compression.py network
    OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmarks/compression.py peers

Accuracy is that of the exported file in ONNX Runtime on the whole test split; latencies are medians, one thread,
interleaved with those of the source. `digits` keeps finished runs in --folder and goes on where it was stopped.
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from espalier.composition import networks
from espalier.compression.base import finalize
from espalier.config.compose import compose
from espalier.export import deployed, onnx, onnx_operators
from espalier.profiling import latency
from espalier.run import Run
from espalier.runs import checkpoint
from espalier.validate import prepare

ESPALIER = str(Path(sys.executable).parent / "espalier")
QUIET = ("logger=[csv]", "callbacks=[checkpoint,monitor]")
RECIPES = {
    "digits_small": ("experiment=digits_small",),
    "digits_sparse": ("experiment=digits_sparse",),
    "digits_lowrank": ("experiment=digits_lowrank",),
    "prune_channels": ("compression=[prune_channels]",),
    "prune_channels,distill": ("compression=[prune_channels,distill]",),
    "prune_nm 2:4": ("compression=[prune_nm]",),
    "qat": ("compression=[qat]",),
    "ptq": ("compression=[ptq]",),
}
WIDE = ("model=resnet", "model.depth=[1,1,1]", "model.width=64", "data=synthetic_images", "data/augment=[]")
ROUNDS = 15


def main() -> None:
    """One table per word."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["digits", "network", "peers"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("logs/benchmark"))
    words = parser.parse_args()
    if words.table == "digits":
        digits(words.folder, words.seeds, words.recipes)
    elif words.table == "network":
        network()
    else:
        peers(words.folder)


def digits(folder: Path, seeds: list[int], recipes: list[str]) -> None:
    """Mean over seeds, and the range, of what each recipe loses and gains against its own source."""
    print(f"seeds {seeds}; mean (lowest to highest)")
    print(f"{'recipe':24}{'accuracy':>9}{'points lost':>24}{'size':>8}{'MACs':>8}{'batch 1':>9}{'batch 32':>9}")
    for recipe in recipes:
        done = [compressed(folder, seed, recipe) for seed in seeds]
        accuracies = [[row["metrics"]["test/accuracy"] for row in report["rows"]] for report in done]
        lost = [100 * (first - last) for first, *_, last in accuracies]
        mean = {name: statistics.mean(report["ratios"][name] for report in done) for name in done[0]["ratios"]}
        accuracy = statistics.mean(last for *_, last in accuracies)
        spread = f"{statistics.mean(lost):8.2f} ({min(lost):5.2f} to {max(lost):5.2f})"
        smaller = f"{mean['size']:7.1f}x{mean['macs']:7.1f}x"
        faster = f"{1 / mean['latency_1']:8.2f}x{1 / mean['latency_32']:8.2f}x"
        print(f"{recipe:24}{accuracy:9.4f}{spread}{smaller}{faster}", flush=True)


def compressed(folder: Path, seed: int, recipe: str) -> dict[str, Any]:
    """Return the report of a recipe on the source of this seed, from a run of the command line."""
    words = (f"source={source(folder, seed)}", f"seed={seed}", *RECIPES[recipe])
    return report_of(run_of(folder, recipe, seed), "compress", *words)


def run_of(folder: Path, recipe: str, seed: int) -> Path:
    """Its run folder; Hydra would take a comma for a sweep."""
    return folder / f"{recipe.replace(',', '+').replace(' ', '_')}_{seed}"


def source(folder: Path, seed: int) -> Path:
    """Return the run folder of the default network on digits."""
    target = folder / f"source_{seed}"
    report_of(target, "train", f"seed={seed}")
    return target


def report_of(target: Path, *words: str) -> dict[str, Any]:
    """Return the report in a run folder, after the command that fills it if it has none."""
    file = target / "report.json"
    if not file.exists():
        subprocess.run([ESPALIER, *words, *QUIET, f"hydra.run.dir={target}"], check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def network() -> None:
    """Latency of 1.2 M parameters at 32x32: int8 beside float and beside ONNX Runtime's own int8; fewer channels."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = {method: exported(folder, method) for method in ("fp32", "qat")}
        files["ort static"] = ort_static(files["fp32"], samples_of(run_with()), folder / "static.onnx")
        half = ("compression=[prune_channels]", "compression.prune_channels.budget=macs")
        files["prune_channels 4x"] = exported(folder, "prune", *half, "compression.prune_channels.speedup=4")
        timed = {batch_size: compare(files, batch_size) for batch_size in (1, 32)}
        print(
            f"{'network':20}{'size kB':>9}{'batch 1 ms':>12}{'of fp32':>9}{'batch 32 ms':>13}{'of fp32':>9}  operators"
        )
        for label, file in files.items():
            layers = {
                kind: count
                for kind, count in onnx_operators.operators(file).items()
                if "Conv" in kind or "Gemm" in kind
            }
            one, many = timed[1][label], timed[32][label]
            print(
                f"{label:20}{file.stat().st_size / 1e3:9.0f}{one.p50:12.3f}{one.ratio:9.2f}"
                f"{many.p50:13.3f}{many.ratio:9.2f}  {layers}"
            )


def exported(folder: Path, name: str, *words: str) -> Path:
    """Return the untrained wide network after a method, as a file."""
    run = run_with(*(words or ((f"compression=[{name}]",) if name != "fp32" else ())))
    model, history = run.model, []
    for method in run.compressions:
        model, entry = method.apply_to(model)
        history.append(entry)
    with torch.no_grad():
        model.train()(samples_of(run))  # statistics of norms, ranges of quantizers
    onnx.write(finalize(model, history), run.data.spec, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def run_with(*words: str) -> Run:
    """Return a run of the wide network that nobody starts."""
    return prepare(compose([*WIDE, *words, *QUIET]), [], Path("unused"), "train")


def samples_of(run: Run) -> Tensor:
    """Return inputs for calibration."""
    return run.data.samples(256).x


def compare(files: dict[str, Path], batch_size: int) -> dict[str, latency.Latency]:
    """Of files that take the same input."""
    x = torch.randn(batch_size, *[3, 32, 32])
    sessions = {name: onnx.Session(file, threads=1) for name, file in files.items()}
    return latency.compare({name: calling(session, x) for name, session in sessions.items()}, ROUNDS)


def calling(session: onnx.Session, x: Tensor) -> Any:
    """Return a call to be timed."""
    return lambda: session(x)


class Calibration(CalibrationDataReader):
    """Feeds ONNX Runtime's own calibration."""

    def __init__(self, x: Tensor) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter({"input": part.numpy()} for part in x.split(64))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def ort_static(float_file: Path, x: Tensor, target: Path) -> Path:
    """ONNX Runtime's static quantization, QDQ, int8 weights per channel, as its documentation advises for CPUs."""
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_file), str(prepared))
    quantize_static(
        str(prepared),
        str(target),
        Calibration(x),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    return target


def peers(folder: Path) -> None:
    """Ours beside what users have today, on the digits network of seed 0."""
    start = source(folder, 0).resolve()
    stored = checkpoint.load("source", start / "checkpoints" / "best.ckpt")
    masks(start)
    with TemporaryDirectory() as name:
        run = prepare(
            compose(["task=evaluate", f"source={start}", *QUIET]), [f"source={start}"], Path(name), "evaluate"
        )
        files = {"fp32": Path(name) / "fp32.onnx"}
        onnx.write(networks.trained(stored).eval(), run.data.spec, files["fp32"])
        files["ONNX Runtime static PTQ"] = ort_static(
            files["fp32"], run.data.samples(512).x, Path(name) / "static.onnx"
        )
        files["torch-pruning, fine-tuned"] = torch_pruning_alone(run, stored, Path(name) / "pruned.onnx")
        for recipe in ("ptq", "qat", "prune_channels", "prune_channels,distill", "digits_small"):
            compressed(folder, 0, recipe)
            files[f"ours: {recipe}"] = run_of(folder, recipe, 0) / "export" / "compressed.onnx"
        x = next(iter(run.data.loader("test", 1, is_whole=True))).x
        sessions = {label: onnx.Session(file, threads=1) for label, file in files.items()}
        timed = latency.compare({label: calling(session, x) for label, session in sessions.items()}, ROUNDS)
        print(f"\n{'digits, seed 0':32}{'accuracy':>9}{'size kB':>9}{'batch 1 of fp32':>17}")
        for label, file in files.items():
            accuracy = deployed.score(sessions[label], run.learner, run.data.loader("test", is_whole=True))
            size = file.stat().st_size / 1e3
            print(f"{label:32}{accuracy['test/accuracy']:9.4f}{size:9.1f}{timed[label].ratio:17.2f}")


def torch_pruning_alone(run: Run, stored: checkpoint.Checkpoint, target: Path) -> Path:
    """Do as its documentation shows: half of all channels by group norm, then the same fine-tuning, no teacher."""
    import torch_pruning

    model = networks.trained(stored)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(1, *run.data.spec.shape),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        round_to=8,
    )
    pruner.step()
    run.learner.model = model
    with TemporaryDirectory() as folder:
        keeper = ModelCheckpoint(folder, "best", monitor="val/accuracy", mode="max")
        trainer = plain_trainer(30, keeper)
        trainer.fit(run.learner, run.data)
        best = torch.load(keeper.best_model_path, weights_only=True)["state_dict"]
        run.learner.load_state_dict(best)
    onnx.write(run.learner.model.eval(), run.data.spec, target)
    return target


def masks(start: Path) -> None:
    """Share of zeros when half of the weights are asked for: each epoch, and in the first step after a resume."""
    print(f"{'asked for: half of the weights':48}{'share of zeros':>15}")
    with TemporaryDirectory() as name:
        keeper = ModelCheckpoint(name, "{epoch}", every_n_epochs=1, save_top_k=-1)
        trainer = plain_trainer(4, keeper, lightning_pruning())
        learner, data = learner_and_data(start)
        trainer.fit(learner, data)
        print(f"{'Lightning ModelPruning, after 4 epochs':48}{zeros(learner.model):15.3f}")
        learner, data = learner_and_data(start)
        watch = FirstStep()
        plain_trainer(4, lightning_pruning(), watch).fit(learner, data, ckpt_path=Path(name) / "epoch=1.ckpt")
        print(f"{'Lightning ModelPruning, first step after resume':48}{watch.zeros:15.3f}")
        words = ("compression=[prune_magnitude]", "compression.prune_magnitude.sparsity=0.5", "trainer.max_epochs=4")
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        report_of(whole, "compress", f"source={start}", *words)
        print(f"{'ours, after 4 epochs':48}{zeros_of(whole):15.3f}")
        kill_after_two_epochs(
            [ESPALIER, "compress", f"source={start}", *words, *QUIET, f"hydra.run.dir={killed}"], killed
        )
        subprocess.run([ESPALIER, "compress", f"resume={killed}"], check=True, stdout=subprocess.DEVNULL)
        print(f"{'ours, killed after 2 epochs and resumed':48}{zeros_of(killed):15.3f}")


def kill_after_two_epochs(command: list[str], run: Path) -> None:
    """Start it, and kill -9 it as soon as its log holds the second validation."""
    log = run / "metrics.csv"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
            time.sleep(0.05)
        process.kill()
    assert not (run / "report.json").exists(), "it had finished"


def zeros_of(run: Path) -> float:
    """Share of zeros in the pruned weights of the best checkpoint."""
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    pruned = [state[name.removesuffix("_mask")] for name in state if name.endswith("_mask")]
    return 1 - sum(int(weight.count_nonzero()) for weight in pruned) / sum(weight.numel() for weight in pruned)


def lightning_pruning() -> ModelPruning:
    """Lightning's callback at its defaults, but for the lottery ticket, which would set the weights back."""
    return ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"], use_lottery_ticket_hypothesis=False)


class FirstStep(L.Callback):
    """Zeros after the first step of a fit."""

    zeros = -1.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.zeros < 0:
            self.zeros = zeros(pl_module.model)  # type: ignore[arg-type]


def zeros(model: nn.Module) -> float:
    """Share of zeros in all kernels and matrices."""
    weights = [value for name, value in model.named_parameters() if value.ndim > 1]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def learner_and_data(start: Path) -> tuple[Any, Any]:
    """Of a run that starts from the trained network."""
    run = prepare(compose([f"source={start}", *QUIET]), [f"source={start}"], Path("unused"), "train")
    with contextlib.redirect_stdout(io.StringIO()):
        return run.learner, run.data


def plain_trainer(max_epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """Lightning without anything of ours."""
    return L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
    )


if __name__ == "__main__":
    main()
