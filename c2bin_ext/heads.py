"""The cluster heads of several scales over one representation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from c2bin_ext import _checks, functional
from c2bin_ext._numerics import unit_rows, wide_dtype, without_autocast

__all__ = ["MultiScaleClusterHead"]


class MultiScaleClusterHead(nn.Module):
    """Soft cluster assignments at several scales from one representation, Eq. 2-3 and 6.

    Formula: `P_K = softmax(W_K r + b_K)` for every K. The maps of all scales are one fused linear
    of ΣK outputs, `linear`, computed in float32 also under autocast and with half parameters.

    Args:
        in_features: size d of the runner's backbone features (before any projector).
        num_clusters: K of each head, in the order of the outputs.
        bias: whether the linear map has a bias.
        normalize: L2-normalise every image's features to the length √d first, `√d r / ‖r‖` in
            place of `r`, so that none counts for more by its length, see
            `docs/explanation/defaults.md`. A vector that is zero stays zero.
        hidden_features: width of one hidden layer, `hidden` (linear, batch norm, ReLU), between
            features and the fused linear. It helps on the fixed features of a pretrained network,
            and hurts when the backbone trains. None: no such layer, as printed.

    Returns:
        Called with `features` (n, d): a tuple with one (n, K) tensor per head, rows sum to 1,
        float32 (float64 stays).

    Raises:
        TypeError: an argument of the wrong type, or features that are not floating-point.
        ValueError: in_features or hidden_features < 1, no K or a K < 2; at the call, features that
            are not (n, d), n >= 1 (n >= 2 in training with a hidden layer), or lie on another
            device.

    Examples:
        >>> import torch
        >>> from c2bin_ext import MultiScaleClusterHead
        >>> head = MultiScaleClusterHead(in_features=512)
        >>> [tuple(assignments.shape) for assignments in head(torch.randn(16, 512))]
        [(16, 32), (16, 64), (16, 128)]

    Source: C2BIN, sections 3.3 and 3.4.
    """

    def __init__(
        self,
        in_features: int,
        num_clusters: Sequence[int] = (32, 64, 128),
        bias: bool = True,
        normalize: bool = False,
        hidden_features: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _checks.whole_number("in_features", in_features, 1)
        self.num_clusters = _checks.cluster_counts(num_clusters)
        self.normalize = _checks.flag("normalize", normalize)
        self.hidden_features, self.hidden, width = hidden_features, None, in_features
        if hidden_features is not None:
            width = _checks.whole_number("hidden_features", hidden_features, 1)
            # No bias: the batch norm takes the mean away.
            linear = nn.Linear(in_features, width, bias=False)
            self.hidden = nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU())
        self.linear = nn.Linear(width, sum(self.num_clusters), bias=_checks.flag("bias", bias))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return functional.cluster_assignments(self._scores(features), self.num_clusters)

    def logits(self, features: Tensor) -> tuple[Tensor, ...]:
        """Scores of every head before the softmax, `W_K r + b_K`.

        Formula: `z = W r + b`, the argument of the softmax in Eq. 2.

        Args:
            features: the runner's backbone features, (n, d).

        Returns:
            A tuple with one (n, K) tensor per head, float32 (float64 stays).

        Raises:
            TypeError: features that are not floating-point.
            ValueError: features that are not (n, d), n >= 1, or lie on another device.

        Examples:
            >>> import torch
            >>> from c2bin_ext import MultiScaleClusterHead
            >>> coarse, fine = MultiScaleClusterHead(8, (4, 16)).logits(torch.randn(2, 8))
            >>> fine.shape
            torch.Size([2, 16])

        Source: C2BIN, section 3.3.
        """
        return torch.split(self._scores(features), list(self.num_clusters), dim=1)

    def extra_repr(self) -> str:
        options = ", normalize=True" if self.normalize else ""
        options += f", hidden_features={self.hidden_features}" if self.hidden else ""
        return f"in_features={self.in_features}, num_clusters={self.num_clusters}{options}"

    def _scores(self, features: Tensor) -> Tensor:
        _checks.matrix("features", features, "(n, d)")
        weight = self.linear.weight
        if features.shape[1] != self.in_features:
            raise ValueError(
                f"features: expected shape (n, {self.in_features}) for in_features="
                f"{self.in_features}, got shape {tuple(features.shape)}"
            )
        _checks.same_device("features", features, "the head's weight", weight)
        if self.hidden is not None and self.training and len(features) < 2:
            raise ValueError(
                "features: expected n >= 2 rows in training, over which the hidden layer is "
                f"normalised, got shape {tuple(features.shape)}"
            )
        dtype = features.dtype
        # Of the weight the dtype alone is read: torch 2.2 exports no parameter that is used twice.
        features = features.to(wide_dtype(features, weight))
        if self.normalize:
            features = unit_rows(features, dtype) * self.in_features**0.5
        with without_autocast(features):
            if self.hidden is not None:
                features = _in_dtype(self.hidden, features)
            return _in_dtype(self.linear, features)


def _in_dtype(module: nn.Module, rows: Tensor) -> Tensor:
    """Call a module in the dtype of `rows`, also where its parameters are narrower."""
    if all(parameter.dtype is rows.dtype for parameter in module.parameters()):
        # Through the module, so that hooks, pruning and wrappers of it take part.
        result: Tensor = module(rows)
        return result
    state = {
        name: tensor.to(rows.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    result = functional_call(module, state, (rows,))
    for name, buffer in module.named_buffers():
        buffer.copy_(state[name])
    return result
