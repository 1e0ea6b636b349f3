"""The operators of the core as Python functions.

Thin on purpose: checks, dispatch and autograd live in C++ (csrc/ops).

The tensors of a call lie on one device, the CPU or CUDA. Where bfloat16 is taken, CUDA takes float16 as well. On CUDA
nobody waits: values that the CPU refuses with ``ValueError`` (an expert, token or target outside its range) stop a CUDA
kernel with a device-side assertion, which torch reports at a later call; ``CUDA_LAUNCH_BLOCKING=1`` finds the one.
"""

from __future__ import annotations

from micro.ops.blocks import block_forward, block_train
from micro.ops.head import cross_entropy, sample
from micro.ops.interventions import intervene, moments_
from micro.ops.layers import (
    expert_attention,
    expert_linear,
    rms_norm,
    rope,
    rope_frequencies,
    rope_table,
    stacked_linear,
    swiglu,
)
from micro.ops.optimizer import adamw_step, gradient_norm
from micro.ops.routing import combine, label_loss, load_balancing_loss, permute, plan, route, routing_entropy, z_loss

__all__ = [
    "adamw_step",
    "block_forward",
    "block_train",
    "combine",
    "cross_entropy",
    "expert_attention",
    "expert_linear",
    "gradient_norm",
    "intervene",
    "label_loss",
    "load_balancing_loss",
    "moments_",
    "permute",
    "plan",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "route",
    "routing_entropy",
    "sample",
    "stacked_linear",
    "swiglu",
    "z_loss",
]
