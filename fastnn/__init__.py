"""Fused Triton kernels for Linear + BatchNorm + ReLU + Dropout, as drop-in torch.nn modules.

``python -m fastnn`` reports the environment and checks every kernel on the device at hand.
"""

from . import functional, nn, optim

__all__ = ["__version__", "functional", "nn", "optim"]
__version__ = "0.1.0"
