"""Variable-length attention: one signature, several backends.

Shapes: T packed tokens (Tq queries, Tk keys), R rows of a layout, N heads, H head size, B sequences.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlt_retrieval.encoders.layouts import LayoutPlan

Backend = Literal["auto", "sdpa", "torch", "flash_attn"]
_HEAD_SIZE_MULTIPLE = 8  # flash kernels take head sizes that are multiples of 8

# What scaled_dot_product_attention runs on a CPU: q, k, v to (out, logsumexp), and back from (grad, q, k, v, out,
# logsumexp).
_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

logger = logging.getLogger(__name__)


def attend_varlen(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention inside each packed sequence.

    Args:
        q_TNH: [Tq, N, H]; k_TNH, v_TNH: [Tk, N, H]; one dtype and device.
        cu_q, cu_k: int32 [B + 1], offsets of the sequences on the two token axes.
        max_q, max_k: longest sequence on either axis.
        scale: factor of the logits; None means 1 / sqrt(H).
        backend: "sdpa" (any device and dtype, the reference), "torch" (torch.nn.attention.varlen, CUDA half
            precision), "flash_attn" (flash_attn_varlen_func, likewise), or "auto": the fastest that can run.
    Returns:
        [Tq, N, H], the queries' dtype.
    Raises:
        ValueError: an unknown backend, or one that cannot run on these tensors.
    """
    chosen = _choose(backend, q_TNH)
    return _BACKENDS[chosen](q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, scale)


def attend_rows(
    q_RNH: Tensor, k_RNH: Tensor, v_RNH: Tensor, plan: LayoutPlan, *, backend: Backend = "auto"
) -> Tensor:
    """Attention of each sequence's rows over the keys that its plan names (with their bias): [R, N, H].

    Where keys are chosen rows, neighbouring sequences of a clip share most of them. Kernels for packed sequences get
    them copied out; on a CPU, only what changes is written into one buffer, which spares the memory traffic of a whole
    frame's keys and values for each frame, and keeping all of them for the gradient.
    """
    if (
        plan.key_rows is not None
        and plan.key_bias is None
        and _choose(backend, q_RNH) == "sdpa"
        and q_RNH.is_cpu
    ):
        attended: Tensor = _UpdatedAttention.apply(q_RNH, k_RNH, v_RNH, plan)
        return attended
    if plan.key_rows is not None:
        k_RNH, v_RNH = (kv.index_select(0, plan.key_rows) for kv in (k_RNH, v_RNH))
    return attend_biased(
        q_RNH, k_RNH, v_RNH, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, plan.key_bias, backend=backend
    )


def attend_biased(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    key_bias_T: Tensor | None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`attend_varlen` with a bias on the logits of each key, float32 [Tk], or without one."""
    if key_bias_T is None:
        return attend_varlen(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, backend=backend)
    head_size = q_TNH.shape[-1]
    q_TNH, k_TNH, v_TNH, scale = with_key_bias(q_TNH, k_TNH, v_TNH, key_bias_T)
    out = attend_varlen(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, scale, backend=backend)
    return out[..., :head_size]


class _UpdatedAttention(torch.autograd.Function):
    """On a CPU, one sequence at a time over a buffer of keys and values that takes what changes from the one before.

    PyTorch's CPU kernel and its backward are called by themselves: what they need for gradients is a number a row and
    head beside the output, and the buffers come back step by step.
    """

    @staticmethod
    def forward(ctx: Any, q_RNH: Tensor, k_RNH: Tensor, v_RNH: Tensor, plan: LayoutPlan) -> Tensor:
        out_RNH = torch.empty_like(q_RNH)
        keys = k_RNH.new_empty(plan.max_k, *k_RNH.shape[1:])
        values = torch.empty_like(keys)
        logsumexps = []
        for own, (places, rows) in zip(_slices(plan), plan.key_updates, strict=True):
            keys.index_copy_(0, places, k_RNH.index_select(0, rows))
            values.index_copy_(0, places, v_RNH.index_select(0, rows))
            out_1NTH, logsumexp_1NT = _CPU_KERNEL(*map(_heads_first, (q_RNH[own], keys, values)))
            out_RNH[own] = out_1NTH[0].transpose(0, 1)
            logsumexps.append(logsumexp_1NT[0].transpose(0, 1))
        ctx.plan = plan
        ctx.save_for_backward(q_RNH, k_RNH, v_RNH, out_RNH, torch.cat(logsumexps))
        return out_RNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_RNH, k_RNH, v_RNH, out_RNH, logsumexp_RN = ctx.saved_tensors
        plan: LayoutPlan = ctx.plan
        q_grad = torch.empty_like(q_RNH)
        sums = [(kv_RNH, torch.zeros_like(kv_RNH)) for kv_RNH in (k_RNH, v_RNH)]
        keys_SK = plan.key_rows_by_sequence
        # Backwards: what a sequence brought is seen by those after it, which have added to `pending` by then.
        buffers = [kv_RNH.index_select(0, keys_SK[-1]) for kv_RNH, _ in sums]
        pending = [torch.zeros_like(buffer) for buffer in buffers]
        steps = list(zip(_slices(plan), plan.key_updates, [None, *keys_SK[:-1]], strict=True))
        for own, (places, rows), before_K in reversed(steps):
            inputs = (grad_RNH[own], q_RNH[own], *buffers, out_RNH[own])
            logsumexp_1NT = logsumexp_RN[own].transpose(0, 1)[None]
            q_part, *grads = _CPU_KERNEL_BACKWARD(*map(_heads_first, inputs), logsumexp_1NT, 0.0, False)
            q_grad[own] = q_part[0].transpose(0, 1)
            for (kv_RNH, kv_grad), buffer, due, grad in zip(sums, buffers, pending, grads, strict=True):
                due += grad[0].transpose(0, 1)
                kv_grad.index_add_(0, rows, due.index_select(0, places))
                due.index_fill_(0, places, 0)
                if before_K is not None:
                    buffer.index_copy_(0, places, kv_RNH.index_select(0, before_K[places]))
        (_, k_grad), (_, v_grad) = sums
        return q_grad, k_grad, v_grad, None


def _slices(plan: LayoutPlan) -> list[slice]:
    """The rows of each sequence."""
    ends = list(itertools.accumulate(plan.lengths, initial=0))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _heads_first(x_TNH: Tensor) -> Tensor:
    """A batch of one sequence, as PyTorch's kernels take it: [1, N, T, H]."""
    return x_TNH.transpose(0, 1)[None]


def with_key_bias(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, bias_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Tensors and scale with which any backend adds `bias_T[key]` to the logits of each key.

    The bias rides on one extra pair of head dimensions, its high and its low part, because kernels take no
    per-key bias and one bfloat16 channel alone is off by up to 0.4 % of the bias. Padded with zeros to a
    multiple of 8 for the flash kernels; cut the output back to the first H dimensions.

    Args:
        bias_T: float32 [Tk], in units of the logit (added after scaling).
    Returns:
        q, k, v with a head size of H + 2 rounded up to 8, and the scale to pass on (1 / sqrt(H)).
    """
    head_size = q_TNH.shape[-1]
    padding = -(head_size + 2) % _HEAD_SIZE_MULTIPLE
    scaled_T = bias_T.float() * math.sqrt(head_size)
    high_T = scaled_T.to(k_TNH.dtype)
    low_T = (scaled_T - high_T.float()).to(k_TNH.dtype)
    pair_TN2 = torch.stack([high_T, low_T], -1)[:, None].expand(-1, k_TNH.shape[1], -1)
    k_bias = F.pad(torch.cat([k_TNH, pair_TN2], -1), (0, padding))
    q_ones = F.pad(F.pad(q_TNH, (0, 2), value=1.0), (0, padding))
    return q_ones, k_bias, F.pad(v_TNH, (0, 2 + padding)), 1.0 / math.sqrt(head_size)


def _sdpa(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> Tensor:
    """One sequence at a time through torch's scaled_dot_product_attention."""
    q_parts = q_TNH.transpose(0, 1).split(cu_q.diff().tolist(), dim=1)
    k_parts = k_TNH.transpose(0, 1).split(cu_k.diff().tolist(), dim=1)
    v_parts = v_TNH.transpose(0, 1).split(cu_k.diff().tolist(), dim=1)
    outputs = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        for q, k, v in zip(q_parts, k_parts, v_parts, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _torch_varlen(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, scale=scale)
    assert isinstance(out, Tensor)
    return out


def _flash_attn(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, softmax_scale=scale)


_BACKENDS = {"sdpa": _sdpa, "torch": _torch_varlen, "flash_attn": _flash_attn}


def _choose(backend: Backend, q_TNH: Tensor) -> str:
    if backend != "auto":
        if backend not in _BACKENDS:
            raise ValueError(f"attention backend {backend!r} is unknown; choose auto, {', '.join(_BACKENDS)}")
        if backend != "sdpa" and not _can_run_kernel(backend, q_TNH):
            raise ValueError(
                f"attention backend {backend!r} needs its package and bfloat16/float16 CUDA tensors with a head "
                f"size that is a multiple of 8; got {q_TNH.dtype} on {q_TNH.device}, head size "
                f"{q_TNH.shape[-1]}: use 'auto' or 'sdpa'"
            )
        return backend
    chosen = next((name for name in ("flash_attn", "torch") if _can_run_kernel(name, q_TNH)), "sdpa")
    _announce(chosen, q_TNH.device.type)
    return chosen


def _can_run_kernel(backend: str, q_TNH: Tensor) -> bool:
    return (
        q_TNH.is_cuda
        and q_TNH.dtype in (torch.bfloat16, torch.float16)
        and q_TNH.shape[-1] % _HEAD_SIZE_MULTIPLE == 0
        and _has_package(backend)
    )


@functools.cache
def _has_package(backend: str) -> bool:
    try:
        importlib.import_module({"torch": "torch.nn.attention.varlen", "flash_attn": "flash_attn"}[backend])
    except ModuleNotFoundError:
        return False
    except ImportError as error:  # built for another torch: "auto" must go on without it
        logger.warning("attention backend %s is installed but does not import: %s", backend, error)
        return False
    return True


@functools.cache
def _announce(chosen: str, device_type: str) -> None:
    logger.info("attention backend on %s: %s", device_type, chosen)
