#!/usr/bin/env python3
"""Send `espalier serve` thousands of odd requests while good ones run, and see that it stands.

Some seventy kinds (`odd_requests.py`): bad JSON, strings in place of numbers, wrong shapes, oversized, truncated and
slow bodies, half-closed connections, pipelines, wishes for other protocols, long heads, foreign hosts, damaged pictures
and forms, decompression bombs and bytes that are no HTTP. Each must get what its kind allows, none a 5xx; good requests
meanwhile must all get the right probabilities, each within 2 s; the memory of the server, at its highest, may grow by
less than 200 MB. Exit code 1 where something of that fails.

    .venv/bin/python scripts/chaos/requests.py BUNDLE [--requests 20000] [--at-once 50]
"""

import argparse
import asyncio
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if __name__ == "requests":  # a library wants the package of this name, for another script of this folder
    kept, sys.path[:] = list(sys.path), [each for each in sys.path if Path(each).resolve() != HERE]
    del sys.modules["requests"]
    importlib.import_module("requests")  # which the import statement then gives to the library
    sys.path[:] = kept

if TYPE_CHECKING:
    from odd_requests import Odd, Shot

    from espalier.serving.predictor import Predictor

TIME_LIMIT_S = 15.0  # of the server: large pictures queue up on a busy machine
ANSWER_WITHIN_S = 60.0
TOLERANCE = 1e-4  # of a probability: batches of other sizes round differently
GOOD_CLIENTS = 4
MAX_GROWTH_MB = 200.0
MAX_GOOD_S = 2.0


async def ask(port: int, shot: "Shot") -> list[tuple[int, Any]]:
    """Status and content of each answer; status 0 where one is missing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    answers: list[tuple[int, Any]] = []
    try:
        try:
            for piece in shot.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(shot.pause_s)
            if shot.ends:
                writer.write_eof()
        except ConnectionError:
            pass  # refused before all was sent; the answer may be there all the same
        while len(answers) < shot.num_answers:
            first = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"(?i)content-length: (\d+)", first)
            body = await reader.readexactly(int(found[1]) if found else 0)
            answers.append((int(first.split(b" ", 2)[1]), json.loads(body)))
    except (ConnectionError, asyncio.IncompleteReadError, ValueError) as error:
        answers.append((0, {"error": repr(error)}))
    finally:
        writer.close()
    return answers


class Attack:
    """Odd and good clients at one server, and what went wrong."""

    def __init__(self, port: int, odd: "Odd", predictor: "Predictor") -> None:
        self.port, self.odd, self.predictor = port, odd, predictor
        self.wrong: list[str] = []
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.good_s: list[float] = []

    async def run(self, count: int, at_once: int) -> None:
        """Send `count` odd requests, `at_once` at a time, with good ones beside them."""
        left, done = iter(range(count)), asyncio.Event()
        good = [asyncio.create_task(self._good_client(seed, done)) for seed in range(GOOD_CLIENTS)]
        await asyncio.gather(*(self._odd_client(left) for _ in range(at_once)))
        done.set()
        await asyncio.gather(*good)

    async def _odd_client(self, left: Any) -> None:
        for _ in left:
            name, shot = self.odd.draw()
            try:
                answers = await asyncio.wait_for(ask(self.port, shot), ANSWER_WITHIN_S)
            except TimeoutError:
                answers = [(0, {"error": "no answer"})]
            for status, content in answers:
                self.statuses[name, status] += 1
                is_told = status == 200 or (isinstance(content.get("error"), str) and content["error"])
                if status not in shot.allowed or not is_told:
                    self.wrong.append(f"{name}: {status} {content} for {shot.pieces[0][:200]!r}")

    async def _good_client(self, seed: int, done: asyncio.Event) -> None:
        import numpy as np
        from odd_requests import Shot, post

        draw, spec = np.random.default_rng(seed), self.predictor.spec
        while not done.is_set():
            raw = draw.integers(0, int(spec.scale) + 1, (1, *spec.shape)).astype(np.float32)
            expected = self.predictor.predict(raw)[0]
            shot = Shot((post(json.dumps({"inputs": raw.tolist()}).encode()),))
            began = time.perf_counter()
            [(status, content)] = await ask(self.port, shot)
            self.good_s.append(time.perf_counter() - began)
            given = list(content["predictions"][0]["probabilities"].values()) if status == 200 else []
            if status != 200 or np.abs(np.array(given) - expected).max() > TOLERANCE:
                self.wrong.append(f"good request: {status} {content}")
            await asyncio.sleep(0.01)


def memory_mb(process: int, name: str) -> float:
    """Resident memory: `VmRSS` now, `VmHWM` at its highest."""
    return int(re.findall(rf"{name}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0]) / 1024


def main() -> int:
    """Exit code 1 where the server did not stand."""
    from odd_requests import MAX_BODY, Odd

    from espalier.serving.predictor import Predictor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--warm-up", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1800, help="fail if it takes longer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    predictor = Predictor(options.bundle, threads=1)
    knobs = ["task.port=0", f"task.max_body_mb={MAX_BODY / 1e6}", f"task.time_limit_s={TIME_LIMIT_S}"]
    words = ["-m", "espalier.cli", "serve", f"source='{options.bundle.resolve()}'", *knobs]
    if not predictor.bundle.content.get("config", {}).get("model"):  # no export of a run: the server alone
        own = ["--port", "0", "--max-body-mb", str(MAX_BODY / 1e6), "--time-limit-s", str(TIME_LIMIT_S)]
        words = ["-m", "espalier.serving", str(options.bundle), *own]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().strip().rpartition(":")[2])
            odd = Odd(predictor.spec.shape, options.seed)
            warm, attack = (Attack(port, odd, predictor) for _ in range(2))
            asyncio.run(warm.run(options.warm_up, options.at_once))
            before = memory_mb(server.pid, "VmRSS")
            asyncio.run(asyncio.wait_for(attack.run(options.requests, options.at_once), options.seconds))
            after, highest = (memory_mb(server.pid, name) for name in ("VmRSS", "VmHWM"))
            is_alive = server.poll() is None
        finally:
            server.terminate()
            code = server.wait(30)
        log.seek(0)
        written = log.read()
    for name in odd.kinds:
        found = [f"{number} x {status}" for (kind, status), number in sorted(attack.statuses.items()) if kind == name]
        print(f"  {name:24} {', '.join(found)}")
    wrong = warm.wrong + attack.wrong
    num_5xx = sum(number for (_, status), number in attack.statuses.items() if status >= 500)
    slowest, growth = max(attack.good_s), highest - before
    print(
        f"requests: {options.requests} of {len(odd.kinds)} kinds, {num_5xx} x 5xx, {len(wrong)} not as they should be"
    )
    print(f"good ones beside them: {len(attack.good_s)}, the slowest took {slowest:.2f} s")
    print(f"RSS {before:.1f} MB -> {after:.1f} MB, at most {highest:.1f} MB: growth {growth:.1f} MB")
    print(f"alive: {is_alive}; exit code {code}; {len(written)} bytes in its log")
    print(*wrong[:10], written[:1000], sep="\n")
    stands = is_alive and code == 0 and not wrong and not num_5xx
    return int(not stands or growth >= MAX_GROWTH_MB or slowest >= MAX_GOOD_S)


if __name__ == "__main__":
    sys.exit(main())
