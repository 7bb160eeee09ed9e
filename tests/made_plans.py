"""Plans of packed sequences made without a video, and a small transformer that runs a reducer over them.

Shapes: S sequences, R rows, K keys, D width, N heads, H head size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlt_retrieval.encoders.attention import attend_rows
from rlt_retrieval.encoders.layouts import LayoutPlan
from rlt_retrieval.encoders.reducers.merging import NetworkReducer

WIDTH, HEADS = 12, 3


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def plan_of(
    lengths: Sequence[int],
    *,
    clips: Sequence[int] | None = None,
    weights: Tensor | None = None,
    has_cls: bool = True,
) -> LayoutPlan:
    """Sequences of these lengths (their CLS counted), each attending to its own rows; one clip each unless told.

    Where rows have weights, attention is proportional to them from the start.
    """
    patches = iter(range(1, 1 + sum(lengths)))
    rows = [0 if has_cls and place == 0 else next(patches) for length in lengths for place in range(length)]
    return LayoutPlan(
        rows=torch.tensor(rows),
        cu_q=offsets(lengths),
        key_rows=None,
        cu_k=offsets(lengths),
        max_k=max(lengths),
        weights=torch.ones(len(rows)) if weights is None else weights,
        key_bias=None if weights is None else weights.log(),
        clip_of_sequence=torch.tensor(list(range(len(lengths))) if clips is None else clips),
        sequence_weights=torch.ones(len(lengths)),
        lengths=tuple(lengths),
        first_lengths=tuple(lengths),
    )


def with_keys(plan: LayoutPlan, keys: Sequence[Sequence[int]]) -> LayoutPlan:
    """The plan in which each sequence's keys are these rows."""
    counts = [len(rows) for rows in keys]
    key_rows = torch.tensor([row for rows in keys for row in rows])
    return replace(plan, key_rows=key_rows, cu_k=offsets(counts), max_k=max(counts))


def one_sequence(plan: LayoutPlan, sequence: int) -> tuple[slice, LayoutPlan]:
    """Rows of one sequence, and the plan of it alone (its own rows are its keys)."""
    start, end = plan.cu_q[sequence : sequence + 2].tolist()
    rows = slice(start, end)
    alone = replace(
        plan_of([end - start]),
        rows=plan.rows[rows],
        weights=plan.weights[rows],
        key_bias=None if plan.key_bias is None else plan.key_bias[rows],
        sequence_weights=plan.sequence_weights[sequence : sequence + 1],
    )
    return rows, alone


def random_rows(plan: LayoutPlan, seed: int = 0) -> Tensor:
    """float64 [R, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(plan.rows), WIDTH, generator=generator, dtype=torch.float64)


def run_tower(
    reducer: NetworkReducer | None, x_RD: Tensor, plan: LayoutPlan, num_blocks: int, seed: int = 0
) -> tuple[Tensor, list[LayoutPlan]]:
    """Blocks of attention and a small MLP with fixed random weights: what comes out, and the plan after each block."""
    generator = torch.Generator().manual_seed(seed)
    plans = []
    for index in range(num_blocks):
        qkv, out, mlp = (
            torch.randn(WIDTH, columns, generator=generator, dtype=x_RD.dtype) / WIDTH**0.5
            for columns in (3 * WIDTH, WIDTH, WIDTH)
        )
        q, k, v = (x_RD @ qkv).unflatten(-1, (3, HEADS, -1)).unbind(1)
        x_RD = x_RD + attend_rows(q, k, v, plan, backend="sdpa").flatten(1) @ out
        if reducer is not None:
            x_RD, plan = reducer.after_attention(index, x_RD, plan, q, k)
        x_RD = x_RD + torch.tanh(x_RD @ mlp)
        if reducer is not None:
            x_RD, plan = reducer.after_block(index, x_RD, plan)
        plans.append(plan)
    return x_RD, plans


def assert_consistent(plan: LayoutPlan, first: LayoutPlan) -> None:
    """Offsets, lengths and owners of a plan after merges fit together, and every CLS is where it was."""
    num_rows = len(plan.rows)
    assert plan.owner is not None
    assert int(plan.cu_q[-1]) == num_rows == len(plan.weights)
    assert int(plan.cu_q.diff().max()) == plan.max_q
    assert int(plan.cu_k.diff().max()) == plan.max_k
    assert len(plan.owner) == len(first.rows)
    assert set(range(num_rows)) <= set(plan.owner.tolist()) <= {-1, *range(num_rows)}
    for row, cls in enumerate((first.rows == 0).tolist()):
        assert not cls or plan.rows[plan.owner[row]] == 0
    cls_rows = (plan.rows == 0).nonzero()[:, 0].tolist()
    assert cls_rows in ([], plan.first_rows.tolist())
