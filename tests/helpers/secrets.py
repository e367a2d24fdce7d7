"""Secrets that nobody may find again, a part that mishandles them, and the search through what a run leaves behind."""

import base64
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import lightning as L

from conftest import command
from helpers import composing

IN_ENVIRONMENT = {
    "HF_TOKEN": "hf_Canary7Qm2Rz9Lw4Tx8Kc",
    "WANDB_API_KEY": "c0ffee5eed0ddba11c0ffee5eed0ddba11c0ffee",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret=Jx83hQ==",
    "MY_SERVICE_PASSWORD": 'canary pass\'word "quoted" $9',
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-61d0",
    "HTTPS_PROXY_PASS": "canary-proxy-9c1e",
}
IN_DOTENV = "canary-dotenv-5b77"
TYPED = "canary-typed-1f04"
CONTROL = "harmless-canary-88aa"  # under a name that speaks of nothing: it must be found, or the search is blind
FROM_VARIABLE = (
    "+callbacks.login.token='${oc.env:HF_TOKEN}'",
    "+callbacks.login.phrase='${oc.env:MY_SERVICE_PASSWORD}'",
)
LOGIN = ("+callbacks.login._target_=helpers.secrets.Login", f"+callbacks.login.note={CONTROL}", *FROM_VARIABLE)


class Login(L.Callback):
    """Gets secrets from its configuration, and tells them to the log, in a warning, and in the error that it raises."""

    def __init__(self, token: str, phrase: str, note: str, fails: bool = False) -> None:
        if token != IN_ENVIRONMENT["HF_TOKEN"]:
            raise ValueError("the secret did not reach the part that needs it")
        self.token, self.phrase, self.note, self.fails = token, phrase, note, fails

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log = logging.getLogger("canary")
        log.warning("signed in with %s and %s for %s", self.token, self.phrase, self.note)
        warnings.warn(f"{self.phrase} expires soon", UserWarning, stacklevel=1)
        try:
            raise ValueError(f"api_key={TYPED}")  # a secret that is in no variable
        except ValueError:
            log.exception("again with %s", self.token)
        if self.fails:
            raise RuntimeError(f"no access with {self.token} to https://me:{TYPED}@127.0.0.1/")


def forms(secret: str) -> set[bytes]:
    """The ways in which a secret may lie in a file: plain, in an address, reversed, wide, as hex and as base64."""
    plain = secret.encode()
    padded = [base64.b64encode(b"\0" * shift + plain).rstrip(b"=") for shift in range(3)]
    inner = {text[(0, 2, 3)[shift] :][:-1] for shift, text in enumerate(padded)}  # what its neighbours cannot change
    return {
        plain,
        quote(secret, safe="").encode(),
        plain[::-1],
        secret.encode("utf-16-le"),
        plain.hex().encode(),
        *inner,
    }


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file, of those inside archives too; a name is part of what a run leaves behind."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == ".env":  # the one that lies there before
            yield name, b""
            continue
        yield name, path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((f"{name}/{member}", archive.read(member)) for member in archive.namelist())


def found(secrets: Iterable[str], left: Iterable[tuple[str, bytes]]) -> list[str]:
    """`NAME: FORM` for each place where a secret lies."""
    wanted = [form for secret in secrets for form in sorted(forms(secret))]
    return [
        f"{name}: {form!r}" for name, content in left for form in wanted if form in content or form in name.encode()
    ]


def run(commands: Sequence[Sequence[str]]) -> None:
    """Run each command line in this process, print its exit code, and end each as the interpreter would."""
    composing.share()
    for words in commands:
        try:
            code = command(words, Path.cwd()).code
        except Exception:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            code = 1
        print("exit code", code, flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
