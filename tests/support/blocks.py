"""Fused blocks as problems for support.numerics.judge: how to draw one, eager torch's answer and ours."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn import ops
from fastnn.activations import ACTIVATIONS
from fastnn.reference import BatchNorm
from support.numerics import Tensors
from support.philox import multiplier

PLANS = ("columns", "split", "whole_batch", "epilogue")  # of Linear and training-mode BatchNorm
PLANS_OF_LINEAR = ("whole_batch", "epilogue")  # those with the product in them
KEY = 0x0123_4567_89AB_CDEF
LEAVES = ("x", "weight", "bias", "gamma", "beta")
BUFFERS = ("running_mean", "running_var")
AXES = {
    "x": "MK", "weight": "NK", "bias": "N", "gamma": "N", "beta": "N", "running_mean": "N", "running_var": "N",
    "g": "MN", "mask": "MN", "out": "MN",
}  # fmt: skip
AXES |= {"d" + name: AXES[name] for name in LEAVES}


@dataclass(frozen=True)
class Block:
    """A run of M rows, K features in and N out; without `linear`, K is N. norm: "batch", "running" or "none".

    With `passes` the Linear's weight is the identity (K = N), so that z is x to the bit.
    """

    M: int
    K: int
    N: int
    dtype: torch.dtype = torch.float32
    norm: str = "batch"
    linear: bool = True
    passes: bool = False
    bias: bool = False
    affine: bool = True
    activation: str = "relu"
    arguments: tuple[float, float] = (0.0, 0.0)
    p: float = 0.0
    mean: float = 0.0  # of the input
    spread: float = 1.0  # of the input
    grads: bool = True  # without, only the forward runs, which is when eval BatchNorm folds into the GEMM
    device: torch.device = field(default_factory=torch.get_default_device)
    autocast: torch.dtype | None = None  # what a Linear's operands are cast to

    @property
    def axes(self) -> dict[str, str]:
        """Of the inputs and outputs this block has."""
        present = {"x", "g", "out", "dx"}
        present |= {"weight", "dweight"} if self.linear else set()
        present |= {"mask"} if self.p > 0 else set()
        if self.bias:
            present |= {"bias"} if self.norm == "batch" else {"bias", "dbias"}
        if self.norm != "none":
            present |= {"gamma", "beta", "dgamma", "dbeta"} if self.affine else set()
            present |= set(BUFFERS)
        if not self.grads:
            present = {name for name in present if not name.startswith("d")}
        axes = AXES if self.linear else AXES | {"x": "MN", "dx": "MN"}
        return {name: axes[name] for name in sorted(present)}

    def draw(self, generator: torch.Generator) -> Tensors:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        drawn = {"x": self.mean + self.spread * normal(self.M, self.K), "g": normal(self.M, self.N)}
        if self.linear:
            weight = normal(self.N, self.K) / self.K**0.5
            drawn["weight"] = torch.eye(self.N, dtype=torch.float64) if self.passes else weight
        if self.bias:
            drawn["bias"] = normal(self.N)
        if self.norm != "none":
            drawn |= {"running_mean": normal(self.N), "running_var": normal(self.N).exp()}
            if self.affine:
                drawn |= {"gamma": 1 + 0.5 * normal(self.N), "beta": 0.5 * normal(self.N)}
        drawn["g"] *= self._gate_is_decided(drawn)
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in drawn.items()}
        tensors["g"] = tensors["g"].to(self.autocast or self.dtype)
        if self.p > 0:
            tensors["mask"] = torch.from_numpy(multiplier(KEY, self.M, self.N, self.p)).to(self.device)
        return tensors

    def _gate_is_decided(self, drawn: Tensors) -> Tensor:
        """False where a ReLU's gate is rounding noise: one flip there outweighs all other errors of a gradient.

        The noise of y is that of z, a rounding or two of |mean| + |z|, over z's spread; 8 eps of it is beyond doubt.
        """
        z = F.linear(drawn["x"], drawn["weight"], drawn.get("bias")) if self.linear else drawn["x"]
        noise, y = z.abs(), z
        if self.norm != "none":
            stats = (drawn["running_mean"], drawn["running_var"])
            mean, var = (z.mean(0), z.var(0, correction=0)) if self.norm == "batch" else stats
            gamma, beta = drawn.get("gamma", torch.ones(self.N)), drawn.get("beta", torch.zeros(self.N))
            scale = gamma * (var + 1e-5).rsqrt()
            y, noise = (z - mean) * scale + beta, (z.abs() + mean.abs()) * scale.abs() + beta.abs()
        return y.abs() > 8 * torch.finfo(self.autocast or self.dtype).eps * noise

    def batch_norm(self, inputs: Tensors) -> BatchNorm | None:
        if self.norm == "none":
            return None
        mean, var, gamma, beta = (inputs.get(name) for name in (*BUFFERS, "gamma", "beta"))
        return BatchNorm(mean, var, gamma, beta, training=self.norm == "batch")

    def eager(self, inputs: Tensors) -> Tensors:
        """torch.nn.functional's ops one after another; dropout as torch's CUDA kernel does it, rounding once."""
        leaves = {name: inputs[name].requires_grad_(self.grads) for name in LEAVES if name in inputs}
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            y = F.linear(leaves["x"], leaves["weight"], leaves.get("bias")) if self.linear else leaves["x"]
        norm = self.batch_norm(inputs)
        if norm is not None:
            y = F.batch_norm(y, *norm[:4], norm.training, eps=norm.eps)
        out = ACTIVATIONS[self.activation].function(y, *self.arguments)
        if self.p > 0:
            wide = torch.promote_types(out.dtype, torch.float32)
            out = (out.to(wide) * inputs["mask"]).to(out.dtype)
        return self._outputs(out, leaves, inputs)

    def ours(self, inputs: Tensors) -> Tensors:
        leaves = {name: inputs[name].requires_grad_(self.grads) for name in LEAVES if name in inputs}
        seed = torch.tensor(KEY, device="cpu") if self.p > 0 else None  # the host's, as in plain calls
        out = ops.block(
            leaves["x"], leaves.get("weight"), leaves.get("bias"), self.batch_norm(inputs), seed,
            self.activation, *self.arguments, self.p, self.autocast,
        )  # fmt: skip
        return self._outputs(out, leaves, inputs)

    def _outputs(self, out: Tensor, leaves: Tensors, inputs: Tensors) -> Tensors:
        if self.grads:
            out.backward(inputs["g"])
        results = {"out": out.detach()}
        results |= {"d" + name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if self.norm == "batch":
            results |= {name: inputs[name] for name in BUFFERS}
            results.pop("dbias", None)  # zero in mathematics, noise in eager: no relative error
        return results
