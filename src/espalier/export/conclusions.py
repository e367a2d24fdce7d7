"""Remarks on the table of exported networks: what was lost, and what is smaller without being faster."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from espalier.compression.base import Conversion
from espalier.export import formats, onnx_operators
from espalier.export.deployed import Artifact
from espalier.reporting.report import bytes_

NUM_NAMED = 3  # layers that a remark names
NUM_RANKED = 10  # layers that a scan lists
NOISE = 1.05  # ratio of two latencies from which on the difference is one

Row = Mapping[str, Any]  # of a report


def drop(before: Row, after: Row, metric: str, mode: Literal["min", "max"], max_drop: float) -> str:
    """Return a line with the metric before and after; mark a loss of more than `max_drop`, in the metric's unit."""
    then, now = before["metrics"][metric], after["metrics"][metric]
    lost = then - now if mode == "max" else now - then
    line = f"{metric} {then:.4f} -> {now:.4f}, " + (f"{lost:.4f} lost" if lost > 0 else "nothing lost")
    return f"TOO MUCH LOST: {line}, more than task.max_drop={max_drop:g}" if lost > max_drop else line


def kept_in_float(name: str, conversion: Conversion | None) -> Iterator[str]:
    """Yield a remark if a format does not carry out the quantization that the network was trained for."""
    if conversion is not None and conversion.kind not in formats.named(name).conversions:
        yield f"{name} keeps in float what ONNX Runtime computes in {conversion.bits} bits ({conversion.kind})"


def agreement(metric: str, values: Mapping[str, float]) -> str:
    """Return a line with the same metric for each form of the network: prepared, converted, deployed."""
    return f"{metric}: " + ", ".join(f"{form} {value:.4f}" for form, value in values.items())


def fusion(quantized: Artifact) -> str:
    """Say which integer operators the runtime runs, that it runs none, or which layers it left in float."""
    unfused = onnx_operators.unfused(quantized.path)
    if unfused:
        return (
            f"NOT FUSED, run in float by {quantized.runtime}: {', '.join(unfused[:NUM_NAMED])} ({len(unfused)} in all)"
        )
    integer = {
        name: count
        for name, count in onnx_operators.operators(quantized.path).items()
        if onnx_operators.is_integer(name)
    }
    if not integer:
        return f"no layer runs in integers: {quantized.runtime} computes in float"
    return "fused: " + ", ".join(f"{count} {name}" for name, count in sorted(integer.items()))


def slower(rows: Iterable[Row], after: Row) -> Iterator[str]:
    """Yield a line for each of `rows` and each batch size at which `after` takes longer."""
    for row in rows:
        for batch_size, timed in row["latency_ms"].items():
            ratio = after["latency_ms"][batch_size]["p50"] / timed["p50"]
            if ratio > NOISE:
                yield f"SLOWER at batch {batch_size}: {ratio:.2f}x the latency of {row['name']}"


def zeros(after: Row, pruned: Artifact) -> str:
    """Say what masked zeros bring: no speed with dense kernels, and a smaller file only when it is packed."""
    packed = len(zlib.compress(pruned.path.read_bytes()))
    share = 1 - after["nonzero"] / after["params"]
    return (
        f"{share:.3f} of all parameters are zero; {pruned.runtime} multiplies by zeros as by anything else, "
        f"so they save time nowhere and space where the file travels packed: {bytes_(packed)} by zlib"
    )


def most_sensitive(growth: Mapping[str, float]) -> str:
    """Return the first layers of a sensitivity scan."""
    return ", ".join(f"{layer} ({loss:+.3g})" for layer, loss in list(growth.items())[:NUM_NAMED])


def ranking(growth: Mapping[str, float]) -> str:
    """Return a line for each of the first layers of a sensitivity scan."""
    return "\n".join(f"  {loss:+10.3g}  {layer}" for layer, loss in list(growth.items())[:NUM_RANKED])
