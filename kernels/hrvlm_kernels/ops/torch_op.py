"""How the torch ops are made, and their namespace: ``torch.ops.hrvlm_kernels`` if installed.

A process may hold several copies of the package: the installed one, and builds loaded from the
Hugging Face Hub, each under a module name of its own. torch refuses to define an op twice, so the
namespace is the name under which this copy was imported, as Hub kernels must have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_package = __name__.rpartition(".ops.")[0] or "hrvlm_kernels"
NAMESPACE = _package.replace(".", "_")  # torch takes no dots
ops = getattr(torch.ops, NAMESPACE)
_lib = torch.library.Library(NAMESPACE, "FRAGMENT")


def add_op_namespace_prefix(name: str) -> str:
    """``<namespace>::<name>``; kernel-builder looks for decorators that go without it."""
    return f"{NAMESPACE}::{name}"


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Define the op `name`: its kernel, the shapes of its outputs, and its gradient.

    Args:
        name: Without the namespace.
        schema: Arguments and results, ``"(Tensor x) -> Tensor"``.
        run: The implementation for the CPU (interpreter) and GPUs.
        fake: The same on fake tensors.
        setup_context: What `backward` needs, as ``torch.library.register_autograd`` takes it.
        backward: The gradient formula.
    """
    _lib.define(name + schema)
    for device in ("CPU", "CUDA"):
        _lib.impl(name, run, device)
    full_name = add_op_namespace_prefix(name)
    torch.library.register_fake(full_name, fake, lib=_lib)
    torch.library.register_autograd(full_name, backward, setup_context=setup_context, lib=_lib)


def register_backward(
    name: str, schema: str, run: Callable[..., Any], *, fake: Callable[..., Any]
) -> None:
    """Define an op that computes a gradient; a gradient of the gradient raises."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{name}: the Triton kernels have no double backward; "
            'use backend="eager" for second derivatives'
        )

    register(name, schema, run, fake=fake, setup_context=_save_nothing, backward=refuse)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass
