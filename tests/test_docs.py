"""The documentation is true: its commands pass the check, its examples run, its numbers are those of the code."""

import ast
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from conftest import QUICK, Command
from espalier.cli import folders, help_pages
from espalier.compression.base import check_recipe
from espalier.config import check, compose, conf_dir, inherit, overrides
from espalier.reporting import report
from espalier.spec import Report
from espalier.validate import MAY_CHANGE, prepare

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")  # epochs are short here

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = next(iter(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]))
PACKAGE = conf_dir.__name__.partition(".")[0]
STARTS = (re.escape(COMMAND), rf"torchrun [^|]*-m {PACKAGE}\.cli", rf"for .*; do {re.escape(COMMAND)}")
TYPED = re.compile(rf"(?:{'|'.join(STARTS)})(?= |$)(?P<words>[^;|]*)")
FENCE = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
INLINE = re.compile(r"`([^`\n]+)`")
NAMED_GROUPS = (
    *("data", "data/augment", "model", "learner", "optimizer", "scheduler"),
    *("compression", "strategy", "callbacks", "logger"),
)
FLAGS = {"-m", "--multirun", "--traceback", "--cfg", "job", "-p"}


def blocks(page: Path, *kinds: str) -> list[str]:
    return [found["text"] for found in FENCE.finditer(page.read_text()) if found["kind"] in kinds]


def commands_in(page: Path) -> Iterator[str]:
    """What follows the name of the command: in code blocks of a shell, in indented blocks, between backticks."""
    prose = FENCE.sub("", page.read_text())
    indented = [text for text in INDENTED.findall(prose) if "$ " not in text]
    lines = [line.strip() for text in [*blocks(page, "bash"), *indented] for line in joined(text)]
    spans = INLINE.findall(INDENTED.sub("", prose))
    for text in [*lines, *[span for span in spans if "TASK" not in span]]:
        if found := TYPED.match(text):
            yield shlex.join(shlex.split(found["words"].replace("$seed", "0"), comments=True))


def joined(text: str) -> list[str]:
    """Its lines, those that end in a backslash together with the next."""
    return text.replace("\\\n", " ").splitlines()


COMMANDS = {words: page.name for page in PAGES for words in commands_in(page)}
REFUSED = [  # `$ command`, then the lines that it prints
    (found[1], found[2].splitlines())
    for page in PAGES
    for found in re.finditer(
        rf"^ *\$ {re.escape(COMMAND)} (.*)\n((?: *{PACKAGE}: .*\n)+)", page.read_text(), re.MULTILINE
    )
]
FILES = {  # code blocks that name the file they stand for; a full one in docs/ replaces a sketch in README
    path: f"{body}\n"
    for page in PAGES
    for text in blocks(page, "python", "yaml")
    for path, _, body in [text.strip().removeprefix("# ").partition("\n")]
    if path.startswith(("src/", "conf/"))
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `conf/` with the YAML and Python files that the documentation tells to add."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(conf_dir.CONF, folder / "conf")
    for path, text in FILES.items():
        file = folder / path
        assert not file.exists(), f"{path} is part of the project already"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture
def extended(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as if these files had been added to it."""
    for module in (conf_dir, compose):
        monkeypatch.setattr(module, "CONF", copy / "conf")
    for folder in (copy / "src" / PACKAGE).iterdir():
        package = import_module(f"{PACKAGE}.{folder.name}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    return copy


@cache
def options(*words: str) -> DictConfig:
    """Shared between commands, because Hydra takes a fifth of a second for each."""
    return compose.compose(words)


def composed(*words: str) -> DictConfig:
    """As Hydra does it: options first, then values of keys that exist; RUNs are one word, folders have quotes."""
    words = tuple(re.sub("^source=(.*,.*)", r"source='\1'", word) for word in words)
    words = tuple(
        overrides.folder_word(*word.split("=", 1)) if word.startswith(folders.FOLDERS) else word for word in words
    )
    values = [
        word
        for word in words
        if not word.startswith(("+", "~", "hydra.")) and word.partition("=")[0] not in conf_dir.groups()
    ]
    cfg = options(*[word for word in words if word not in values]).copy()
    for value in overrides.parse(values):
        OmegaConf.update(cfg, value.key_or_group, value.value())
    return cfg


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and the other words."""
    is_flag = [word in FLAGS or before == "-p" for before, word in zip(["", *words], words, strict=False)]
    parts: dict[bool, list[str]] = {True: [], False: []}
    for word, yes in zip(words, is_flag, strict=True):
        parts[yes].append(word)
    return parts[True], parts[False]


@pytest.mark.usefixtures("extended")
@pytest.mark.parametrize("text", COMMANDS)
def test_a_documented_command_passes_the_check(text: str):
    flags, words = split(shlex.split(re.sub(r"seed=0,1,[\d,]+", "seed=0,1", text)))
    if "--help" in words:
        assert set(words) - {"--help"} <= {*conf_dir.groups(), *conf_dir.groups()["task"]}
        return
    if not words:
        return
    task, *others = words
    if task == help_pages.RUNS:
        assert {word.partition("=")[0] for word in others} <= {*help_pages.RUNS_KEYS, help_pages.YES}
        return
    assert task in conf_dir.groups()["task"]
    for trial in overrides.trials(others) if "-m" in flags else [others]:
        cfg = composed(f"task={task}", *trial)
        assert "-p" not in flags or any(name in cfg for name in flags)
        stored = OmegaConf.to_container(composed("task=train"), resolve=True)
        if cfg.source:
            cfg = inherit.from_source(cfg, stored, overrides.parse(trial), may_change=MAY_CHANGE.get(task, ()))
        if cfg.resume not in (None, "auto"):
            cfg = inherit.from_resumed(cfg, stored, overrides.parse(trial))
        check.check(cfg)
        check_recipe([*cfg.compression], [])


@pytest.mark.parametrize(("text", "printed"), REFUSED)
def test_a_documented_refusal_prints_these_lines(espalier: Command, text: str, printed: list[str]):
    done = espalier(*shlex.split(text))
    assert (done.code, done.err.splitlines()) == (2, [line.strip() for line in printed])


def test_the_search_for_commands_and_files_finds_them():
    assert len(COMMANDS) > 120
    assert len(set(COMMANDS.values())) >= 16
    assert any("-m " in words for words in COMMANDS)
    assert any("source=" in words for words in COMMANDS)
    assert any("resume=" in words for words in COMMANDS)
    assert len(REFUSED) >= 3
    assert len([path for path in FILES if path.endswith(".py")]) == 10
    assert len([path for path in FILES if path.endswith(".yaml")]) == 8


@pytest.mark.usefixtures("extended")
def test_the_data_set_optimizer_and_schedule_of_the_guides_train(espalier: Command):
    words = ("data=wine", "optimizer=adagrad", "scheduler=polynomial", "trainer.max_epochs=10", *QUICK)
    assert espalier("train", *words).code == 0
    [row] = report.read(max(Path().glob("logs/train/*"))).rows
    assert row["params"] == 13 * 256 + 256 + 256 * 128 + 128 + 128 * 3 + 3
    assert row["metrics"]["test/accuracy"] > 0.9


@pytest.mark.usefixtures("extended")
@pytest.mark.parametrize("model", ["linear", "all_conv"])
def test_the_models_of_the_guide_learn_digits(espalier: Command, model: str):
    assert espalier("train", f"model={model}", "optimizer.lr=0.02", "trainer.max_epochs=3", *QUICK).code == 0
    [row] = report.read(max(Path().glob("logs/train/*"))).rows
    assert row["metrics"]["test/accuracy"] > 0.8


@pytest.mark.usefixtures("extended")
def test_the_loss_and_the_metric_of_the_guide_train_and_are_measured_again(espalier: Command):
    words = ("model=mlp", "trainer.max_epochs=2", *QUICK)
    assert espalier("train", "learner=focal", *words, "hydra.run.dir=focal").code == 0
    assert espalier("train", *words[:2], *QUICK, "hydra.run.dir=plain").code == 0
    focal, plain = report.read(Path("focal")), report.read(Path("plain"))
    metrics = focal.rows[0]["metrics"]
    assert 0 < metrics["test/loss"] < plain.rows[0]["metrics"]["test/loss"]  # easy samples count less
    assert metrics.keys() - plain.rows[0]["metrics"].keys() == {"test/recall"}
    assert espalier("evaluate", "source=focal", "hydra.run.dir=again", *QUICK[:1]).code == 0
    assert report.read(Path("again")).rows[0]["metrics"] == metrics


@pytest.mark.usefixtures("extended")
def test_the_task_of_the_guide_reports_what_it_counts(espalier: Command):
    done = espalier("describe", "model=linear", "task.note=only counted", *QUICK)
    assert done.code == 0
    found = report.read(max(Path().glob("logs/describe/*")))
    assert (found.rows[0]["params"], found.rows[0]["macs"]) == (64 * 10 + 10, 64 * 10)
    assert found.notes == ["only counted"]


@pytest.mark.usefixtures("extended")
def test_the_compression_of_the_guide_leaves_nothing_but_powers_of_two(espalier: Command):
    assert espalier("train", "model=cnn", "model.channels=[4,8]", "trainer.max_epochs=2", *QUICK).code == 0
    recipe = ("compression=[powers_of_two]", "compression.powers_of_two.num_exponents=5")
    assert espalier("compress", "source=latest", *recipe, *QUICK).code == 0
    folder = max(Path().glob("logs/compress/*"))
    content = torch.load(folder / "checkpoints" / "compressed.ckpt", weights_only=True)
    assert content["espalier"]["compression"] == [{"method": "powers_of_two", "num_exponents": 5}]
    weights = [value for name, value in content["state_dict"].items() if name.endswith("weight") and value.ndim > 1]
    assert len(weights) == 4
    for weight in weights:
        fraction, exponent = weight.abs().frexp()
        assert (fraction == 0.5).all()
        assert exponent.unique().tolist() == [*range(exponent.max() - 4, exponent.max() + 1)]
    assert "no layer runs in integers: onnxruntime computes in float" in report.read(folder).notes


def test_the_examples_of_the_python_page_run(espalier: Command):
    examples = blocks(ROOT / "docs" / "python.md", "python")
    assert len(examples) >= 4
    Image.new("L", (20, 20), 90).save("seven.png")
    Path("patients.csv").write_text("\n".join(",".join(map(str, range(10))) for _ in range(3)))
    names: dict[str, Any] = {}
    for text in examples:
        if '"exported"' in text:
            assert espalier("export", "source=latest", "hydra.run.dir=exported").code == 0
        exec(compile(text, "docs/python.md", "exec"), names)
    assert names["run"].metrics["test/accuracy"] > 0.2


def test_the_notebook_was_run_and_uses_names_that_exist():
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    sources = ["".join(cell["source"]) for cell in code]
    python = "\n".join(line for text in sources for line in text.splitlines() if not line.startswith("!"))
    package = import_module(PACKAGE)
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(import_module(str(node.module)), each.name) for each in node.names)
        if isinstance(node, ast.Import):
            assert all(import_module(each.name) for each in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            assert hasattr(package, node.attr)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("run", "bundle"):
            assert node.attr in {*dir(package.Loaded), *package.Loaded.__dataclass_fields__}
    [shell] = [text for text in sources if text.startswith("!")]
    assert TYPED.match(shell.removeprefix("!"))


def test_every_option_is_named_in_the_docs():
    spans = {
        word for page in PAGES for span in INLINE.findall(page.read_text()) for word in re.split(r"[ =\[\],]", span)
    }
    options = [(group, option) for group in NAMED_GROUPS for option in conf_dir.groups()[group] if option != "none"]
    assert len(options) > 50
    assert [f"{group}={option}" for group, option in options if option not in spans] == []


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the table whose header row starts like this, without backticks."""
    text = (ROOT / "docs" / page).read_text()
    table = text[text.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


def test_learning_rates_in_the_docs_are_those_of_the_options():
    documented = {name: float(lr) for name, lr, _ in rows_of("training.md", "| option | default `optimizer.lr`")}
    assert documented.keys() == set(conf_dir.groups()["optimizer"])
    for name, lr in documented.items():
        assert float(yaml.safe_load((conf_dir.CONF / "optimizer" / f"{name}.yaml").read_text())["lr"]) == lr, name


def test_what_a_compression_may_ask_for_is_what_a_run_supplies():
    names = {name for name, *_ in rows_of("compression_methods.md", "| argument | type")}
    assert names == check.SUPPLIED["compression"]


@pytest.mark.parametrize("row", rows_of("models.md", "| option | network"), ids=lambda row: row[0])
def test_sizes_and_knobs_in_the_docs_are_those_of_the_models(tmp_path: Path, row: list[str]):
    name, kind, params, macs, knobs = row
    data: tuple[str, ...] = ()
    if "texts" in kind:
        lines = [" ".join(f"w{word}" for word in range(1000)) + f",{number % 2}" for number in range(20)]
        (tmp_path / "words.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
        data = ("data=text", f"data.path={tmp_path / 'words.csv'}", "data.batch_size=2", "data.longest=1000")
    run = prepare(composed(f"model={name}", *data, *QUICK), [], tmp_path, task="train")
    cost = run.cost(None)
    assert (report.si(cost["params"]), report.si(cost["macs"])) == (params, macs)
    assert {knob.strip(" `") for knob in knobs.split(",")} == run.cfg.model.keys() - {
        *("_target_", "activation", "norm", "dropout")
    }


def test_the_report_in_the_docs_has_the_keys_of_a_real_one(espalier: Command):
    [text] = blocks(ROOT / "docs" / "command_line.md", "json")
    documented = json.loads(text)
    assert espalier("train", "model=mlp", "trainer.max_epochs=1", *QUICK).code == 0
    real = json.loads(next(Path().glob("logs/train/*/report.json")).read_text())
    assert list(documented) == list(real)
    assert Report(**documented).schema == real["schema"]
    [row], [real_row] = documented["rows"], real["rows"]
    assert list(row) == list(real_row)
    assert row["metrics"].keys() == real_row["metrics"].keys()
    assert (row["params"], row["macs"]) == (real_row["params"], real_row["macs"])


def test_the_layers_in_the_docs_are_those_of_the_contract():
    text = (ROOT / "docs" / "forking.md").read_text()
    [block] = INDENTED.findall(text[text.index("## Layers") :].partition("\n## ")[0] + "\n\n")
    documented: list[set[str]] = []
    for line in block.splitlines():
        names = set(re.split(r" {2,}", line.strip())[::2])  # each with its words
        documented = [*documented[:-1], documented[-1] | names] if line.startswith(" " * 10) else [*documented, names]
    [layers] = [
        contract["layers"]
        for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    ]
    assert len(layers) > 10
    assert documented == [set(layer.split(" | ")) for layer in layers]


def test_every_link_and_script_in_the_docs_exists():
    pages = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    relative = [(page, target) for page, target in links if "://" not in target]
    assert len(relative) >= 15
    assert [f"{page.name}: {target}" for page, target in relative if not (page.parent / target).exists()] == []
    paths = {path for page in pages for path in re.findall(r"\b(?:scripts|tests|src)/[\w/.]+\w", page.read_text())}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists() and path not in FILES] == []


def test_the_readme_fits_100_lines_and_the_overview_names_every_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 100
    overview = ROOT / "docs" / "overview.md"
    assert f"docs/{overview.name}" in (ROOT / "README.md").read_text()
    assert len(PAGES) >= 11
    assert [page.name for page in PAGES[1:] if page != overview and f"({page.name})" not in overview.read_text()] == []


def test_every_picture_of_the_docs_is_shown_and_small():
    pictures = [*(ROOT / "docs" / "pictures").iterdir()]
    assert len(pictures) >= 5
    shown = {
        (page.parent / path).resolve() for page in PAGES for path in re.findall(r"!\[.+?\]\((.*?)\)", page.read_text())
    }
    assert shown == set(pictures)
    assert [picture.name for picture in pictures if picture.stat().st_size > 150_000] == []
