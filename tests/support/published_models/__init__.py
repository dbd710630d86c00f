"""Models in the styles of published code: what a transformation of models must leave equal, and may fuse."""

from . import generative_and_control, graphs_and_points, self_supervised, tabular
from .entry import Published, Run

MODELS: dict[str, Published] = {
    **tabular.MODELS, **self_supervised.MODELS, **graphs_and_points.MODELS, **generative_and_control.MODELS,
}  # fmt: skip

__all__ = ["MODELS", "Published", "Run"]
