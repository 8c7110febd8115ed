"""How the torch ops are made, and their namespace: ``torch.ops.hrvlm_kernels`` if installed.

A process may hold several copies of the package: the installed one, and builds loaded from the
Hugging Face Hub, each under a module name of its own. torch refuses to define an op twice, so the
namespace is the name under which this copy was imported, as Hub kernels must have it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
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
    launcher: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Define the op `name`: its kernel, the shapes of its outputs, and its gradient.

    A call allocates the outputs as `fake` does, imports the launcher, which needs Triton, and lets
    it write them.

    Args:
        name: Without the namespace.
        schema: Arguments and results, ``"(Tensor x) -> Tensor"``.
        launcher: ``"module:function"`` in triton_kernels/; takes the arguments, then the outputs.
        fake: Empty outputs for the arguments, fake tensors or real ones.
        setup_context: What `backward` needs, as ``torch.library.register_autograd`` takes it.
        backward: The gradient formula.
        arguments: What the launcher gets of the op's arguments; default: all of them.
    """
    module, _, function = launcher.partition(":")

    def run(*args: Any) -> Any:
        outputs = fake(*args)
        start = getattr(import_module(f"..triton_kernels.{module}", __package__), function)
        start(
            *(args if arguments is None else arguments(*args)),
            *(outputs if isinstance(outputs, tuple) else (outputs,)),
        )
        return outputs

    _lib.define(name + schema)
    for device in ("CPU", "CUDA"):
        _lib.impl(name, run, device)
    full_name = add_op_namespace_prefix(name)
    torch.library.register_fake(full_name, fake, lib=_lib)
    torch.library.register_autograd(full_name, backward, setup_context=setup_context, lib=_lib)


def register_backward(
    name: str,
    schema: str,
    launcher: str,
    *,
    fake: Callable[..., Any],
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Define an op that computes a gradient; a gradient of the gradient raises."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{name}: the Triton kernels have no double backward; "
            'use backend="eager" for second derivatives'
        )

    register(
        name, schema, launcher, fake=fake, setup_context=_save_nothing, backward=refuse,
        arguments=arguments,
    )  # fmt: skip


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass
