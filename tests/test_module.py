"""What travels of a torch module: checked against torch's own traversal."""

import torch
from torch import nn

from sfl.train.module import exchanged


class Odd(nn.Module):
    """Everything that a traversal can trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.again = self.first  # a shared module
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(requires_grad=False)
        self.register_parameter("absent", None)
        self.register_buffer("empty", None)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("kept", torch.ones(2))
        self.own = nn.Parameter(torch.zeros(1))
        self.inner = nn.ModuleDict({"block": nn.Sequential(nn.Linear(3, 1), nn.ReLU())})


def test_what_travels_is_what_torch_lists() -> None:
    module = Odd()
    kept = module.state_dict()
    expected = [name for name, p in module.named_parameters() if p.requires_grad]
    expected += [name for name, _ in module.named_buffers() if name in kept]
    assert list(exchanged(module)) == expected
    assert "scratch" not in expected
    assert "norm.num_batches_tracked" in expected


def test_what_travels_is_the_memory_of_the_module() -> None:
    module = Odd()
    for tensor in exchanged(module).values():
        tensor.fill_(7)
    assert all((p == 7).all() for p in module.parameters() if p.requires_grad)
    assert (module.kept == 7).all()
