"""What moe_fx.export costs, by number of experts: one layer that loops over the experts that were hit.

    python benchmarks/export_cost.py --experts 8 64 128

Stacked weights are traced once for any expert, whatever their number; a list of modules must be traced module by
module, as Python can tell one from another. Seconds of one call each; the first, which imports, is not counted.
"""

import argparse
import time

import torch
from torch import nn
from torch.export import Dim

import moe_fx

HIDDEN, INNER, TOP_K = 32, 64, 2


class Router(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts_count = experts
        self.gate = nn.Linear(HIDDEN, experts, bias=False)

    def routed(self, x: torch.Tensor):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K, dim=-1)
        mask = torch.nn.functional.one_hot(ids, self.experts_count).permute(2, 1, 0)
        return weights, mask, (mask.sum(dim=(-1, -2)) > 0).nonzero()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, mask, hit = self.routed(x)
        out = torch.zeros_like(x)
        for expert in hit:
            slot, token = torch.where(mask[expert[0]])
            out.index_add_(0, token, self.apply_expert(expert[0], x[token]) * weights[token, slot, None])
        return out


class Stacked(Router):
    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.up = nn.Parameter(torch.randn(experts, INNER, HIDDEN))
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, INNER))

    def apply_expert(self, expert: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(nn.functional.linear(rows, self.up[expert]))
        return nn.functional.linear(hidden, self.down[expert])


class Modules(Router):
    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, INNER), nn.SiLU(), nn.Linear(INNER, HIDDEN)) for _ in range(experts)
        )

    def apply_expert(self, expert: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.experts[expert](rows)


def seconds(kind: type[Router], experts: int) -> float:
    model, x = kind(experts).eval(), torch.randn(24, HIDDEN)
    started = time.perf_counter()
    with torch.no_grad():
        moe_fx.export(model, (x,), dynamic_shapes=({0: Dim("tokens", min=2, max=4096)},))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 64, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds(Stacked, 4)
    print("| experts | stacked weights, s | list of modules, s |\n|---|---|---|")
    for experts in options.experts:
        print(f"| {experts} | {seconds(Stacked, experts):.1f} | {seconds(Modules, experts):.1f} |", flush=True)


if __name__ == "__main__":
    main()
