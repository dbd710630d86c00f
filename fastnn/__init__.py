"""Fused Triton kernels as drop-in torch.nn modules and torch.optim optimizers.

``nn`` fuses Linear + BatchNorm + ReLU + Dropout, ``optim`` takes each step of an optimizer in one launch.

``python -m fastnn`` reports the environment and checks every kernel on the device at hand.
"""

from . import functional, nn, optim

__all__ = ["__version__", "functional", "nn", "optim"]
__version__ = "0.1.0"
