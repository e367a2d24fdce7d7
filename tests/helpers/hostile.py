"""Checkpoints made by an enemy: each runs code, names code to be run, or breaks what reads it, if it is believed.

Where one is executed, a file appears: the marker.
"""

import copy
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.export import bundle
from espalier.runs import files

Content = dict[str, Any]
Writer = Callable[[Content, Path, Path], None]  # a good checkpoint, the file to write, the marker

CHECKPOINTS: dict[str, Writer] = {}
RESUMED: dict[str, Writer] = {}  # harmless as a source, whose callbacks, loggers and trainer nobody builds


class Call:
    """Pickled, it is a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def touch(marker: Path) -> Call:
    return Call(os.system, f"touch {marker}")


def case(name: str, cases: dict[str, Writer] = CHECKPOINTS) -> Callable[[Writer], Writer]:
    def keep(writer: Writer) -> Writer:
        cases[name] = writer
        return writer

    return keep


def edited(name: str, edit: Callable[[Content, Path], None], cases: dict[str, Writer] = CHECKPOINTS) -> None:
    """A case that says something else than a good checkpoint, in the same archive."""

    def write(content: Content, path: Path, marker: Path) -> None:
        edit(content, marker)
        torch.save(content, path)

    case(name, cases)(write)


def targeted(name: str, group: str, node: Callable[[Path], Any], cases: dict[str, Writer] = CHECKPOINTS) -> None:
    """A case whose configuration names something else to be built."""
    edited(name, lambda content, marker: content["espalier"]["config"].update({group: node(marker)}), cases)


def rezip(path: Path, change: Callable[[str, bytes], Iterator[tuple[str, bytes, int]]]) -> None:
    """Write the members of an archive anew, each as what `change` makes of it: names, contents and compressions."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members:
            for changed, data, compression in change(name, content):
                new.writestr(changed, data, compression)


# pickles that run code


@case("bare pickle")
def _(content: Content, path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(touch(marker)))


@case("file of torch before 1.6")
def _(content: Content, path: Path, marker: Path) -> None:
    torch.save({**content, "x": touch(marker)}, path, _use_new_zipfile_serialization=False)


edited("pickled call in the weights", lambda content, marker: content["state_dict"].update({"x": touch(marker)}))
edited(
    "pickled call in the configuration",
    lambda content, marker: content["espalier"]["config"]["model"].update({"width": touch(marker)}),
)
edited(
    "pickled call of eval",
    lambda content, marker: content.update({"x": Call(eval, f"open({str(marker)!r}, 'w')")}),
)
edited("pickled call in a key", lambda content, marker: content.update({("x", touch(marker)): 1}))


@case("program of TorchScript")
def _(content: Content, path: Path, marker: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)


# calls that are named

edited(
    "_instantiator",
    lambda content, marker: content.update(
        {"hyper_parameters": {"_instantiator": "os.system", "command": f"touch {marker}"}}
    ),
)
targeted("target os.system", "model", lambda marker: {"_target_": "os.system", "command": f"touch {marker}"})
targeted(
    "target builtins.eval",
    "learner",
    lambda marker: {"_target_": "builtins.eval", "_args_": [f"open({str(marker)!r}, 'w')"]},
)
targeted(
    "target in a list in a list",
    "data",
    lambda marker: {
        "_target_": "espalier.data.digits.Digits",
        "batch_size": [[{"_target_": "pathlib.Path.touch", "self": str(marker)}]],
    },
)
targeted(
    "alias of os in a module of ours",
    "model",
    lambda marker: {"_target_": "espalier.cli.entry.os.system", "command": f"touch {marker}"},
)
targeted(
    "alias of torch.load",
    "model",
    lambda marker: {"_target_": "espalier.run.torch.load", "f": str(marker), "weights_only": False},
)
targeted(
    "alias in a package of models",
    "model",
    lambda marker: {"_target_": "espalier.models.mlp.nn.Linear", "in_features": 1},
)
targeted("alias in torch.optim", "learner", lambda marker: {"_target_": "torch.optim.lr_scheduler.types.FunctionType"})
targeted(
    "method of a class of ours", "model", lambda marker: {"_target_": "espalier.models.mlp.MLP.__init__.__class__"}
)
targeted("function of ours that is no part", "data", lambda marker: {"_target_": "espalier.data.module.class_counts"})
targeted(
    "arguments by place",
    "model",
    lambda marker: {"_target_": "espalier.models.mlp.MLP", "hidden": [8], "_args_": [{"_target_": "os.getcwd"}]},
)
targeted("interpolation", "model", lambda marker: {"_target_": "espalier.models.mlp.MLP", "hidden": "${oc.env:HOME}"})

# what breaks the reader


def nested(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = {"x": tree}
    return tree


def shared(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree] * 10
    return tree


targeted("configuration 400 deep", "model", lambda marker: nested(400))
targeted("configuration of a million parts", "model", lambda marker: shared(6))
edited("configuration as YAML", lambda content, marker: content["espalier"].update({"config": "model: ${oc.env:HOME}"}))
edited(
    "data that cannot be", lambda content, marker: content["espalier"]["spec"].update({"shape": "../../x", "scale": []})
)
edited(
    "history with a method of another package",
    lambda content, marker: content["espalier"].update({"compression": [{"method": "../os.system", "x": str(marker)}]}),
)
edited(
    "file to be deleted",
    lambda content, marker: content.update({"callbacks": {"BestAndLast": {"best_k_models": {f"/x/../{marker}": 0.0}}}}),
)


# archives


@case("member that leaves the folder")
def _(content: Content, path: Path, marker: Path) -> None:
    torch.save(content, path)
    rezip(path, lambda name, data: iter([(name, data, 0), (f"../../../../../../../..{marker}", b"", 0)]))


@case("archive that expands a thousandfold")
def _(content: Content, path: Path, marker: Path) -> None:
    torch.save({**content, "x": torch.zeros(2**24)}, path)
    rezip(path, lambda name, data: iter([(name, data, zipfile.ZIP_DEFLATED)]))


@case("two members of one name")
def _(content: Content, path: Path, marker: Path) -> None:
    torch.save(content, path)
    evil = pickle.dumps(touch(marker), protocol=2)
    rezip(path, lambda name, data: iter([(name, data, 0), *([(name, evil, 0)] if name.endswith("data.pkl") else [])]))


@case("two directories")
def _(content: Content, path: Path, marker: Path) -> None:
    """A second archive behind the first: a reader that starts at the end sees it, one that starts in front does not."""
    torch.save({"x": touch(marker)}, path)
    first = path.read_bytes()
    torch.save(content, path)
    path.write_bytes(first + path.read_bytes())


@case("wrong manifest")
def _(content: Content, path: Path, marker: Path) -> None:
    torch.save(content, path)
    (path.parent / "SHA256SUMS").write_text(f"{'0' * 64}  {path.name}\n")


# what only a run that goes on would do

targeted(
    "callback that calls",
    "callbacks",
    lambda marker: {
        "x": {"_target_": "lightning.pytorch.callbacks.LambdaCallback", "setup": {"_target_": "os.system"}}
    },
    RESUMED,
)
targeted(
    "callback that writes elsewhere",
    "callbacks",
    lambda marker: {
        "x": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": str(marker.with_suffix(""))}
    },
    RESUMED,
)
targeted(
    "logger in place of a callback",
    "callbacks",
    lambda marker: {"x": {"_target_": "espalier.loggers.csv_log.CsvLog", "folder": str(marker), "run_name": "x"}},
    RESUMED,
)
targeted(
    "task that executes",
    "task",
    lambda marker: {"_target_": "espalier.tasks.serve.serve", "host": "0.0.0.0"},
    RESUMED,
)
targeted("trainer of another kind", "trainer", lambda marker: {"_target_": "espalier.cli.entry.shutil.rmtree"}, RESUMED)
targeted("callbacks in a list", "callbacks", lambda marker: [1, 2], RESUMED)
edited(
    "best file elsewhere",
    lambda content, marker: content["espalier"]["config"]["callbacks"]["checkpoint"].update(filename=f"{marker}"),
    RESUMED,
)
edited(
    "mirror elsewhere",
    lambda content, marker: content["espalier"]["config"]["callbacks"]["checkpoint"].update(mirror=f"file://{marker}"),
    RESUMED,
)
edited("no trainer", lambda content, marker: content["espalier"]["config"].pop("trainer"), RESUMED)
edited("a seed that is a list", lambda content, marker: content["espalier"]["config"].update(seed=[1]), RESUMED)
edited("a key of its own", lambda content, marker: content["espalier"]["config"].update(evil="x"), RESUMED)
edited("no optimizer", lambda content, marker: content.pop("optimizer_states"), RESUMED)


def write(good: Path, folder: Path, marker: Path, cases: dict[str, Writer]) -> dict[str, Path]:
    """A file for each case, in a run folder of its own, made out of a good checkpoint."""
    content = torch.load(good, weights_only=True)
    paths = {}
    for name, writer in cases.items():
        paths[name] = folder / name.replace(" ", "_") / "checkpoints" / "last.ckpt"
        paths[name].parent.mkdir(parents=True)
        writer(copy.deepcopy(content), paths[name], marker)
    return paths


def write_bundle(good: Path, checkpoint: Path, folder: Path) -> None:
    """A bundle with the hostile file as its network, which says of itself what that checkpoint says, where it can."""
    shutil.copytree(good, folder)
    content = json.loads((folder / bundle.FILE).read_text())
    [name] = content["formats"]["onnx"]["files"]
    shutil.copy(checkpoint, folder / name)
    content["files"][name]["sha256"] = files.sha256(folder / name)
    if (checkpoint.parent / "SHA256SUMS").exists():
        content["files"][name]["sha256"] = "0" * 64
    try:
        said = torch.load(checkpoint, weights_only=True)["espalier"]
        text = json.dumps(
            {**content, "config": said["config"], "data": said["spec"], "compression": said["compression"]}
        )
    except Exception:  # it cannot be read, or not be said in JSON
        text = json.dumps(content)
    (folder / bundle.FILE).write_text(text)
