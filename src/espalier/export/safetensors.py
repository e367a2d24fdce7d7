"""The weights of the deployable network and nothing else: names, shapes and numbers, in an open format.

Who reads them needs the code of the network. Weights have the names of the network's modules. Only a network with fixed
8-bit ranges has integers, scales and zero points instead, under the names of the graph that `torch_export` writes.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save_file
from torch import nn

from espalier.compression.base import Conversion
from espalier.export.formats import DTYPES, Format, InPrecision, converting, draft
from espalier.signature import to_entry
from espalier.spec import DataSpec


class Safetensors(Format):
    """A file of weights alone, which no runtime runs."""

    files: ClassVar[tuple[str, ...]] = ("model.safetensors",)
    precisions: ClassVar[Collection[str]] = tuple(DTYPES)

    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        """Write every parameter and buffer under its name, and the shape of a sample as metadata.

        Tensors that share memory are written once per name.
        """
        if isinstance(model, InPrecision):
            model = model.model
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        metadata = {"format": "pt", **{key: json.dumps(value) for key, value in to_entry(spec).items()}}
        with converting("safetensors"), draft(path) as target:
            save_file(tensors, target, metadata)
