"""Modules that hold the parameters. Every parameter is reached by calling its module, so that adapters apply."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from micro import ops


class StackedLinear(nn.Module):
    """The linear maps of all experts of a layer, one parameter [E,out,in], no bias.

    With ``rows=True`` (queries, output, FFN) the input is [N,in] in plan order and row n goes through its own expert;
    otherwise (keys, values) the input is [E|1,T,in] and every token goes through every expert.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, rows: bool) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features, self.rows = num_experts, in_features, out_features, rows
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Rows x [N,in], offsets int32 [E+1] -> [N,out]; or x [E|1,T,in] -> [E,T,out], where experts without rows in
        ``offsets`` are skipped (their output is 0).
        """
        if self.rows:
            assert offsets is not None
            return ops.expert_linear(x, self.weight, offsets)
        return ops.stacked_linear(x, self.weight, offsets)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class Linear(nn.Linear):
    """A plain linear map without bias, an ``nn.Linear`` in name, parameters and hooks.

    On the CPU it is :func:`micro.ops.stacked_linear` with one matrix, whose rows do not depend on each other's number:
    prefill and decoding give the same bits (performance.md 9.9).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Input [...,in] -> [...,out]."""
        if input.device.type != "cpu":
            return super().forward(input)
        flat = ops.stacked_linear(input.reshape(1, -1, self.in_features), self.weight[None])
        return flat.view(*input.shape[:-1], self.out_features)


class StackedNorm(nn.Module):
    """RMS norms of all experts of a layer, one gain [E,size] (model.md 2.2)."""

    def __init__(self, num_experts: int, size: int, eps: float, *, gain_in_float32: bool) -> None:
        super().__init__()
        self.eps, self.gain_in_float32 = eps, gain_in_float32
        self.weight = nn.Parameter(torch.ones(num_experts, size))

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """Rows x [N,size] with experts int32 [N] -> [N,size]; or x [E|1,T,size] -> [E,T,size]."""
        return ops.rms_norm(x, self.weight, experts, eps=self.eps, gain_in_float32=self.gain_in_float32)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.weight.shape[0]}, size={self.weight.shape[1]}, eps={self.eps}"


class RMSNorm(nn.Module):
    """One RMS norm, gain [size] (model.md 2.2)."""

    def __init__(self, size: int, eps: float, *, gain_in_float32: bool) -> None:
        super().__init__()
        self.eps, self.gain_in_float32 = eps, gain_in_float32
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x [..., size], same shape and dtype."""
        return ops.rms_norm(x, self.weight[None], eps=self.eps, gain_in_float32=self.gain_in_float32)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"size={self.weight.shape[0]}, eps={self.eps}"


class _Touch(torch.autograd.Function):
    """Identity whose backward also hands exact zeros to parameters that took no part in the result."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        parameters = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad, *(torch.zeros_like(p) for p in parameters)


def touch(x: Tensor, module: nn.Module) -> Tensor:
    """The tensor x itself, with a defined zero gradient for every trainable parameter of ``module`` (model.md 2.10.3).

    Distributed reducers stop at parameters without gradient, and AdamW would not decay their moments.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable or not torch.is_grad_enabled():
        return x
    touched: Tensor = _Touch.apply(x, *trainable)  # type: ignore[no-untyped-call]
    return touched
