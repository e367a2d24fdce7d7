"""Run every task with secrets wherever they may come from, then look for them in all that was written and printed.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/chaos/canaries.py

Secrets lie in the environment, in a `.env`, on the command line and in the configuration; home and temporary folder of
the runs are searched too, and every place that holds a configuration is shown to hold what is no secret. Takes minutes.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from conftest import launch
from helpers.secrets import CONTROL, FROM_VARIABLE, IN_DOTENV, IN_ENVIRONMENT, LOGIN, TYPED, contents, forms, found

SECRETS = (*IN_ENVIRONMENT.values(), IN_DOTENV, TYPED)
SMALL = ("model=mlp", "model.hidden=[16]", "trainer.max_epochs=2", "callbacks=[checkpoint,monitor]")
AGAIN = (*LOGIN[:2], *FROM_VARIABLE, "logger=[csv,wandb]")
FAILING = (*SMALL, *LOGIN, "+callbacks.login.fails=true")
COMMANDS = (  # with the exit code of each
    (0, "train", *SMALL, *LOGIN, "logger=[csv,wandb,tensorboard,mlflow]"),
    (0, "train", *SMALL, *LOGIN, "logger=[csv,wandb]", "strategy=ddp_cpu"),
    (0, "evaluate", "source=latest", "task.robustness=[noise]", *AGAIN),
    (0, "explain", "source=latest", "task.samples=1"),
    (0, "export", "source=latest", "task.format=[onnx,safetensors]"),
    (0, "predict", "source=latest"),
    (0, "benchmark", "source=latest", "task.runtimes=[onnx]", "task.batches=[1]", "task.rounds=3"),
    (0, "compress", "source=latest", "compression=[ptq]", "task.batches=[1]", *AGAIN),
    (0, "report", "source=latest"),
    (3, "train", "-m", "seed=0,1", *FAILING, "logger=[csv,wandb]"),
    (1, "train", *FAILING, "logger=[csv,wandb,tensorboard]", "--traceback"),
    (1, "train", *FAILING, "logger=[csv]", "strategy=ddp_cpu"),
    (4, "train", *SMALL, *LOGIN, "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "logger=[csv]"),
    (2, "train", f"+data.token={TYPED}", "--traceback"),
    (2, "train", f"data.toke={IN_ENVIRONMENT['HF_TOKEN']}"),
    (2, "train", "-m", f"+logger.wandb.api_key={TYPED},x"),
    (2, "train", f"+callbacks.login={{password: '{TYPED}'}}"),
    (2, "train", f"+note=s3://me:{TYPED}@127.0.0.1/runs"),
    (2, "train", f"callbacks.checkpoint.mirror=http://{TYPED}@127.0.0.1:9/runs"),
    (2, "train", f"source=http://{TYPED}@127.0.0.1:9/best.ckpt"),
    (2, "train", "model.hidden='${oc.env:HF_TOKEN}'", "model=mlp"),
    (2, "train", "seed='${oc.env:AWS_SECRET_ACCESS_KEY}'"),
)


def main() -> int:
    """Run, search, say what was found; 1 where a secret was, or an exit code is another."""
    start = time.monotonic()
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".env").write_text(f"HF_TOKEN={IN_DOTENV}\nexport SERVICE_SECRET='{IN_DOTENV}'\n")
        own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary"), "WANDB_MODE": "offline"}
        for place in ("home", "temporary"):
            (folder / place).mkdir()
        printed = {}
        for code, *words in COMMANDS:
            done = launch(folder, "espalier.cli", *words, **IN_ENVIRONMENT, **own)
            printed[f"output of command {len(printed)}"] = f"{done.stdout}{done.stderr}".encode()
            print(f"{time.monotonic() - start:5.0f} s  exit code {done.returncode}: {' '.join(words)[:80]}", flush=True)
            if done.returncode != code:
                wrong.append(f"exit code {done.returncode}, not {code}: {' '.join(words)}\n{done.stderr[-1000:]}")
        left = {**dict(contents(folder)), **printed}
    hits = found(SECRETS, left.items())
    seen = {hit.partition(":")[0] for hit in found([CONTROL], left.items())}
    print(*wrong, *hits, sep="\n")
    megabytes = sum(map(len, left.values())) / 1e6
    print(
        f"the canary under a harmless name: in {len(seen)} of them, {', '.join(sorted({Path(x).name for x in seen}))}"
    )
    print(
        f"{len(left)} files, folders and zip members, {megabytes:.1f} MB searched for {len(SECRETS)} canaries in "
        f"{len(forms(TYPED))} forms each after {len(COMMANDS)} commands: {len(hits)} hits"
    )
    return 1 if hits or wrong or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
