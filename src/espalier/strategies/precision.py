"""Networks in 16 bits (`bf16-true`, `16-true`); counts and comparisons stay float32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn


class HalfNetwork(HalfPrecision):
    """Lightning's 16-bit precision for the network alone: targets, class weights and sums of metrics stay float32.

    In bfloat16 a target of 347 would become 348, and 256 + 1 would be 256.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, L.LightningModule):
            module.model.to(self._desired_input_dtype)
            module.input_dtype = self._desired_input_dtype  # type: ignore[assignment]  # see Learner.forward
            return module
        return module.to(self._desired_input_dtype)

    def convert_input(self, data: Any) -> Any:
        """Convert a tensor alone, which is input; a batch holds targets too, and the learner casts its input."""
        return data.to(self._desired_input_dtype) if isinstance(data, Tensor) and data.is_floating_point() else data

    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]  # Lightning's is narrower
        return nullcontext()
