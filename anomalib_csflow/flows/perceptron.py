"""The conditioner of couplings of vectors: a multi-layer perceptron."""

from itertools import pairwise

from torch import nn


class Perceptron(nn.Sequential):
    """Linear layers with ReLUs between them.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        hidden_features: width of every hidden layer.
        num_hidden: number of hidden layers.

    Shape:
        vectors ``(N, in_features)`` to vectors ``(N, out_features)``.
    """

    def __init__(self, in_features: int, out_features: int, hidden_features: int, num_hidden: int) -> None:
        widths = [in_features] + [hidden_features] * num_hidden
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], out_features))
