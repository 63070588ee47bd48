"""The experts of a mixture in a step that is traced without values.

Which tokens an expert gets depends on their values. transformers 5 runs all experts of a layer by two products of
groups of rows, for every token once per expert that it takes: rows are sorted by expert, and only the borders between
the groups are values. So every shape is known beforehand (transformers/integrations/moe.py, grouped_mm_experts_forward,
which `get_correct_experts_implementation` takes where nothing else is asked for, on a CPU and on CUDA alike).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

EXPERTS = "_experts_implementation"  # the field of a configuration that says how experts are run


@contextmanager
def products_of_groups() -> Iterator[None]:
    """Within it, torch's product of groups of rows has a shape in every precision that its kernels know.

    torch 2.13 knows it without values in bfloat16 only, while its kernels also take float32 and float16
    (ATen/native/cuda/GroupedBlas.cpp, _grouped_mm_cuda; on a CPU the same). On CUDA rows of the output begin at
    multiples of 16 bytes, which those of real models do without padding.
    """
    registrations = torch._meta_registrations
    with ExitStack() as stack:
        if hasattr(registrations, "_meta_grouped_mm_common"):
            stack.enter_context(mock.patch.object(registrations, "_meta_grouped_mm_common", _output_of_groups))
        yield


def _output_of_groups(
    mat_a: Tensor,
    mat_b: Tensor,
    *scales: Any,
    offs: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **others: Any,
) -> Tensor:
    create: Any = torch._meta_registrations._create_grouped_mm_output_tensor
    output: Tensor = create(mat_a, mat_b, offs, out_dtype or mat_a.dtype)
    return output


def runs_experts(model: Any) -> bool:
    """Whether a transformers model has experts that it runs as its configuration says."""
    return any(hasattr(module, "_is_expert_parallel") for module in model.modules())


@contextmanager
def groups_on_cuda(capability: tuple[int, ...]) -> Iterator[None]:
    """Within it, experts run by torch's product of groups of rows where CUDA does: from compute capability 8.0 on.

    Before, they run by an operator of transformers that also gives gradients of frozen weights (integrations/moe.py,
    _can_use_grouped_mm and grouped_mm_fallback). Its kernels' workspaces, some kilobytes, are not counted.
    """
    with ExitStack() as stack:
        try:
            from transformers.integrations import moe
        except ImportError:  # transformers 4 has experts of other classes
            moe = None
        if hasattr(moe, "_can_use_grouped_mm"):
            # Not a mock's return value: a mock would keep the tensors that it was called with.
            known = partial(_any_answers, capability >= (8, 0))
            stack.enter_context(mock.patch.object(moe, "_can_use_grouped_mm", known))
        yield


def _any_answers(answer: bool, *_arguments: Any) -> bool:
    return answer
