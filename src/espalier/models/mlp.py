"""Multi-layer perceptron: dense layers on the flattened input, for tables and as a baseline for images.

Rumelhart, Hinton and Williams 1986, doi.org/10.1038/323533a0. Letters: B batch, K outputs.
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import Activation, FeatureNorm, dense_layers, initialise


class MLP(nn.Module):
    """A perceptron: one dense layer per entry of `hidden`, then the head; without entries a linear model."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: Count,
        hidden: Sequence[Count],
        activation: Activation,
        norm: FeatureNorm,
        dropout: Rate,
    ) -> None:
        super().__init__()
        num_inputs = prod(input_shape)
        self.flatten = nn.Flatten()
        self.layers = dense_layers(num_inputs, hidden, activation, norm, dropout)
        self.head = nn.Linear([num_inputs, *hidden][-1], num_outputs)
        initialise(self, self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of samples (B, ...) of any shape."""
        return self.head(self.layers(self.flatten(x)))
