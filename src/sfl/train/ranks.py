"""Processes that train one site together: what rank 0 is told, all are told. Torch is imported when it is needed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

_PATIENCE = timedelta(days=365)
"""They wait for as long as their site has no task: it may be other sites' turn. One that dies ends the wait at once."""


class Ranks:
    """The ranks of this process's group, over a group of their own on the CPU, whatever they train with.

    Every rank makes one, and calls its methods as often as the others do.

    Args:
        number: The rank of this process.
    """

    def __init__(self, number: int) -> None:
        import torch.distributed as dist

        self.number = number
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def told(self, number: int) -> int:
        """A whole number of rank 0, on every rank.

        Args:
            number: What rank 0 says; of others it is left out.
        """
        import torch

        said = torch.tensor([number])
        self._broadcast(said)
        return int(said[0])

    def share_state(self, module: Any) -> None:
        """Give a torch module on every rank the state that it has on rank 0, bit for bit.

        Args:
            module: The same module on every rank.
        """
        import torch

        state = dict(module.state_dict())
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 0:
                here = value.detach().cpu().clone(memory_format=torch.contiguous_format)
                self._broadcast(here.reshape(-1).view(torch.uint8))  # gloo does not know every kind of number
                state[name] = here
        if self.number != 0:
            module.load_state_dict(state)

    def _broadcast(self, tensor: Any) -> None:
        import torch.distributed as dist

        dist.broadcast(tensor, src=0, group=self._group)
