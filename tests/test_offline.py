"""No import, command or training reaches for another machine, and an audit that cannot do so says it."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from espalier.processes import telemetry

ROOT = Path(__file__).parents[1]
# Python runs this before anything else; whatever asks for a name or an address is written down, and refused.
BLOCKED = """
import os, sys

def watch(event, args):
    if event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else "localhost"  # a path: a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    if host not in ("localhost", "127.0.0.1", "::1", "", None):
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{event} {host}\\n")
        raise OSError(f"the network is blocked: {host}")

sys.addaudithook(watch)
"""
IMPORT_ALL = """
import importlib, pkgutil, espalier
names = [module.name for module in pkgutil.walk_packages(espalier.__path__, "espalier.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
RUN_ALL = """
import json, sys
from helpers import secrets as canary
canary.run(json.loads(sys.argv[1]))
"""
SMALL = ("model=mlp", "model.hidden=[16]", "trainer.max_epochs=1")


NAMED = (
    ".cache/matplotlib",
    ".config/matplotlib",
    ".cache/wandb",
    ".config/wandb",
    ".local/share/wandb",
)  # in SECURITY.md


class Blocked:
    """Python without network, and what it tried to reach."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(BLOCKED)
        self.folder = folder
        self.file = folder / "attempts"
        path = f"{folder}{os.pathsep}{Path(__file__).parent}"
        self.home = folder / "home"
        self.home.mkdir()
        own = {"HOME": str(self.home), "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "MPLCONFIGDIR": ""}
        self.environment = {"PYTHONPATH": path, "ATTEMPTS": str(self.file), "WANDB_MODE": "offline", **own}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in telemetry.OFF}
        own = {**kept, "OMP_NUM_THREADS": "1", **self.environment}
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=self.folder, env=own, capture_output=True, text=True, timeout=560)

    @property
    def attempts(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []


@pytest.fixture
def blocked(tmp_path: Path) -> Blocked:
    return Blocked(tmp_path)


def script(folder: Path, text: str) -> str:
    (folder / "script.py").write_text(text)
    return "script"


def test_the_block_notices_names_and_addresses(blocked):
    text = "import socket, urllib.request\nsocket.create_connection(('192.0.2.1', 80), 1)"
    assert "the network is blocked: 192.0.2.1" in blocked.run(script(blocked.folder, text)).stderr
    blocked.run(script(blocked.folder, "import urllib.request\nurllib.request.urlopen('http://example.org')"))
    assert blocked.attempts == ["socket.getaddrinfo 192.0.2.1", "socket.getaddrinfo example.org"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Blocked, subprocess.CompletedProcess[str]]:
    """One process in which every task has run and, in the end, every module is imported."""
    blocked = Blocked(tmp_path_factory.mktemp("blocked"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        COMMANDS["serve", LATEST, f"task.port={taken.getsockname()[1]}"] = 2  # it ends when the network is loaded
        (blocked.folder / "all_of_it.py").write_text(f"{RUN_ALL}{IMPORT_ALL}")
        return blocked, blocked.run("all_of_it", json.dumps(list(COMMANDS)))


LATEST, TABLES = "source=latest", "logger=[csv]"
COMMANDS = {
    (): 0,
    ("train", "--help"): 0,
    ("train", "--cfg", "job"): 0,
    ("train", "modle=mlp"): 2,
    ("train", *SMALL, "logger=[csv,wandb]"): 0,
    ("evaluate", LATEST, TABLES): 0,
    ("explain", LATEST, "task.samples=1", "task.method=[occlusion]", TABLES): 0,
    ("export", LATEST, TABLES): 0,
    ("predict", LATEST, TABLES): 0,
    (
        *("benchmark", LATEST, "task.runtimes=[onnx]", "task.batches=[1]", "task.rounds=1", "task.memory=false"),
        TABLES,
    ): 0,
    ("compress", LATEST, "compression=[ptq]", "task.batches=[1]", TABLES): 0,
    ("report", LATEST, TABLES): 0,
}


@pytest.mark.timeout(600)  # nine tasks and all imports in one process: half a minute on a quiet machine
def test_no_command_no_training_and_no_import_reaches_for_the_network(everything):
    blocked, done = everything
    codes = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("exit code ")]
    assert codes == list(map(str, COMMANDS.values())), done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 100  # modules
    assert blocked.attempts == []


def test_no_task_leaves_anything_in_home_that_we_do_not_name(everything):
    blocked, _ = everything
    left = [str(path.relative_to(blocked.home)) for path in blocked.home.rglob("*") if path.is_file()]
    assert [name for name in left if not name.startswith(NAMED)] == []
    text = (ROOT / "SECURITY.md").read_text()
    assert [name for name in (*NAMED, *telemetry.OFF) if f"`{name}`" not in text and f"`~/{name}`" not in text] == []


def test_what_reports_about_its_use_is_switched_off_before_it_is_imported(blocked):
    text = (
        "import os, sys, espalier\n"
        "print(sorted({'onnxruntime', 'mlflow', 'wandb', 'huggingface_hub'} & {*sys.modules}))\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['DO_NOT_TRACK'])"
    )
    blocked.environment["DO_NOT_TRACK"] = "0"
    done = blocked.run(script(blocked.folder, text))
    assert done.stdout.splitlines() == ["[]", "1 0"]  # what a user has set stays


class Advisories(http.server.BaseHTTPRequestHandler):
    """The part of OSV that is asked, with one advisory: against torch."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]
        affected = [{"package": asked, "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}]}]
        known = {"vulns": [{"id": "CVE-1", "affected": affected}]} if asked["name"] == "torch" else {}
        body = json.dumps(known).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def database() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def audit(folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / "scripts/audit"), "--osv-url", url, "--cache-dir", str(folder)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_an_audit_lists_the_package_that_is_known_to_be_vulnerable(tmp_path, database):
    done = audit(tmp_path, database)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line.split()[::2] for line in done.stdout.splitlines()[2:]] == [["torch", "CVE-1"]]


def test_an_audit_without_an_answer_says_that_nothing_was_checked(tmp_path):
    done = audit(tmp_path, "http://127.0.0.1:9/")
    assert done.returncode == 0
    [line] = done.stdout.splitlines()
    assert line.startswith("audit: the vulnerability database cannot be reached (")
    assert line.endswith("); nothing was checked")


def test_every_file_that_the_trust_model_names_is_there():
    text = (ROOT / "SECURITY.md").read_text()
    named = set(re.findall(r"`((?:tests|scripts|src)/[\w/.]+|[\w.]+\.(?:lock|txt))`", text))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
