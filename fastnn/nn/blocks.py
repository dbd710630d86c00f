"""Constructors of common stacks over Sequential."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .sequential import Sequential


class LinearBatchNormReLUDropout(Sequential):
    """``Sequential(nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout)``, run as one fused op; same state_dict keys.

    Args:
        in_features: K, the input's last dimension.
        out_features: N, the output's.
        p: probability of dropping an element, in [0, 1].
        bias: whether the Linear has a bias. BatchNorm takes its mean away again; False saves it.
        eps, momentum, affine, track_running_stats: of ``nn.BatchNorm1d``.
        device, dtype: of the parameters and buffers.

    Shapes: (M, K) to (M, N).

    Raises:
        ValueError: p outside [0, 1]; a batch of one row in training.
        RuntimeError: an input of another feature count or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        p: float = 0.5,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Linear(in_features, out_features, bias, device, dtype),
            nn.BatchNorm1d(out_features, eps, momentum, affine, track_running_stats, device, dtype),
            nn.ReLU(),
            nn.Dropout(p),
        )


class MLP(Sequential):
    """``torchvision.ops.MLP``: the same signature, children and state_dict keys, its runs fused.

    For each width but the last: Linear, norm_layer, activation_layer, Dropout; for the last: Linear, Dropout
    (torchvision drops out the output too).

    Args:
        in_channels: K, the input's last dimension.
        hidden_channels: the widths; the last is the output's.
        norm_layer: called with the width, e.g. ``nn.BatchNorm1d``; None for no normalisation.
        activation_layer: the activation's class; None for none.
        inplace: passed to the activation and to Dropout; None leaves their default.
        bias: whether the Linear layers have a bias.
        dropout: probability of dropping an element, in [0, 1].

    Shapes: (M, K) to (M, hidden_channels[-1]).

    Raises:
        ValueError: dropout outside [0, 1], no widths; a batch of one row in training with BatchNorm.
        RuntimeError: an input of another feature count or dtype.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: list[int],
        norm_layer: Callable[..., nn.Module] | None = None,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        inplace: bool | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        if not hidden_channels:
            raise ValueError("hidden_channels must name at least the output's width, got []")
        params: dict[str, Any] = {} if inplace is None else {"inplace": inplace}
        layers: list[nn.Module] = []
        width_in = in_channels
        for width in hidden_channels[:-1]:
            layers.append(nn.Linear(width_in, width, bias=bias))
            if norm_layer is not None:
                layers.append(norm_layer(width))
            if activation_layer is not None:
                layers.append(activation_layer(**params))
            layers.append(nn.Dropout(dropout, **params))
            width_in = width
        layers.append(nn.Linear(width_in, hidden_channels[-1], bias=bias))
        layers.append(nn.Dropout(dropout, **params))
        super().__init__(*layers)
