"""A plain convolutional network: convolutions with pooling, then dense layers.

After LeCun et al. 1998, doi.org/10.1109/5.726791, with 3x3 kernels (Simonyan and Zisserman 2014, arXiv 1409.1556).
Letters: B batch, C channels, H height, W width, K outputs.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import Activation, ConvNormAct, Norm, dense_layers, initialise, make_dropout, require_image


class CNN(nn.Module):
    """One 3x3 convolution and 2x2 max pooling per entry of `channels`, then one dense layer per entry of `hidden`.

    The maps are averaged to at most `grid` x `grid` positions before the dense layers, so a large image does not make
    these large. `dropout` is applied before each dense layer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: Count,
        channels: Sequence[Count],
        hidden: Sequence[Count],
        grid: Count,
        activation: Activation,
        norm: Norm,
        dropout: Rate,
    ) -> None:
        super().__init__()
        shrink = 2 ** len(channels)
        remedy = "give model.channels fewer entries, each halves the image"
        in_channels, height, width = require_image("cnn", input_shape, shrink, remedy)
        self.features = nn.Sequential()
        for place, out_channels in enumerate(channels, start=1):
            self.features.add_module(f"conv{place}", ConvNormAct(in_channels, out_channels, 3, 1, norm, activation))
            self.features.add_module(f"pool{place}", nn.MaxPool2d(2))
            in_channels = out_channels
        height, width = height // shrink, width // shrink
        self.average = average_to_grid(height, width, grid)
        self.flatten = nn.Flatten()
        self.dropout = make_dropout(dropout)
        num_features = in_channels * min(height, grid) * min(width, grid)
        self.layers = dense_layers(num_features, hidden, activation, "none", dropout)
        self.head = nn.Linear([num_features, *hidden][-1], num_outputs)
        initialise(self, self.head)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, K)."""
        features = self.flatten(self.average(self.features(x_BCHW)))
        return self.head(self.layers(self.dropout(features)))


def average_to_grid(height: int, width: int, grid: int) -> nn.Module:
    """Return average pooling of (B, C, height, width) to `grid` positions a side; a smaller side keeps its size.

    Windows overlap where `grid` does not divide a side, so that no pixel is lost. The windows are fixed numbers:
    exporters understand them, unlike those of adaptive pooling.
    """
    stride = max(1, height // grid), max(1, width // grid)
    kernel = (
        height - (min(height, grid) - 1) * stride[0],
        width - (min(width, grid) - 1) * stride[1],
    )
    return nn.Identity() if kernel == (1, 1) else nn.AvgPool2d(kernel, stride)
