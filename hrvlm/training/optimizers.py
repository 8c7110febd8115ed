"""Muon for the hidden matrices and AdamW for the rest, as one optimizer for a Trainer.

Muon (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a
matrix; embeddings, heads, norms and biases keep AdamW. torch.optim has both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Several optimizers, each with its own parameters, that step as one.

    Schedulers and checkpoints see one optimizer, whose ``param_groups`` are those of all parts.
    """

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers
        super().__init__([g for o in optimizers for g in o.param_groups], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parts' own groups, so that a learning rate set here is the parts'."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Ignored: torch's constructor sets an empty list; the parts hold the groups."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Do nothing in the constructor, which calls this; later groups belong to a part."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """All parts' state, by parameter; a copy."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            merged.update(optimizer.state)
        return merged

    @state.setter
    def state(self, state: Any) -> None:
        """Ignored: the parts hold the state."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let every part take its step."""
        loss = closure() if closure is not None else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parts."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' state dictionaries, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: it was saved with another number of parts.
        """
        states = state_dict["optimizers"]
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint has {len(states)} optimizers, expected {len(self.optimizers)}"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: a matrix inside one of the numbered blocks of a model."""
    return parameter.ndim == 2 and any(word.isdigit() for word in name.split("."))
