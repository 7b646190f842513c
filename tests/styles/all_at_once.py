"""Every expert on every token, all at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import (
    BATCHED,
    Apart,
    ArgmaxSigmoid,
    H,
    I,
    Interleaved,
    MoE,
    Sequence,
    SigmoidWithBias,
    Simple,
    geglu,
    normal,
    style,
    swiglu,
)


@style("all_experts_repeat_bmm_llama4", **BATCHED)
class Llama4(MoE):
    """Llama 4: sigmoid of a table of -inf, before the experts, which take one flat batch of rows."""

    K = 1
    route = ArgmaxSigmoid
    before = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = normal(self.E, H, 2 * I), normal(self.E, I, H)

    def expert(self, rows, e):
        gate, up = (rows @ self.gate_up_proj[e]).chunk(2, dim=-1)
        return (up * F.silu(gate)) @ self.down_proj[e]

    def experts(self, rows):
        rows = rows.view(self.E, -1, H)
        gate, up = torch.bmm(rows, self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(up * F.silu(gate), self.down_proj).view(-1, H)

    def scores(self, x):
        logits = self.router.linear(x)
        best, ids = torch.topk(logits, self.K, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, best)
        return torch.sigmoid(scores.float()).to(x.dtype)

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, H)
        routed = x.repeat(self.E, 1) * self.scores(x).transpose(0, 1).reshape(-1, 1)
        return self.experts(routed).reshape(self.E, -1, H).sum(dim=0).view(shape)


@style("all_experts_gather_arange_scatter_add_llama4")
class EarlyLlama4(Llama4):
    """The first Llama 4 in transformers: every token gathered for every expert, added into zeros."""

    def forward(self, x):
        tokens = x.shape[0]
        scores = self.scores(x).transpose(0, 1)
        places = torch.arange(tokens, device=x.device).view(1, -1).expand(scores.size(0), -1)
        places = places.reshape(-1, 1).expand(-1, H)
        routed = torch.gather(x, 0, places) * scores.reshape(-1, 1)
        out = torch.zeros_like(x)
        out.scatter_add_(0, places, self.experts(routed).view(-1, H))
        return out


@style("all_experts_repeat_bmm_gpt_oss", **BATCHED)
class GptOssDense(Interleaved):
    """gpt-oss in transformers, for inference: biases, interleaved halves, a table [E, T]."""

    def forward(self, x):
        batch = x.shape[0]
        x = x.reshape(-1, H)
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter_(dim=1, index=ids, src=weights)
        rows = x.repeat(self.E, 1).view(self.E, -1, H)
        h = torch.bmm(rows, self.gate_up_proj) + self.gate_up_proj_bias[..., None, :]
        out = torch.bmm(self.act(h), self.down_proj) + self.down_proj_bias[..., None, :]
        out = out.view(self.E, batch, -1, H)
        out = out * table.transpose(0, 1).view(self.E, batch, -1)[..., None]
        return out.sum(dim=0)


@style("all_experts_einsum_dense_gate")
class EinsumDense(Apart):
    act = staticmethod(swiglu)

    def forward(self, x):
        ids, weights = self.router(x)
        gates = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        gate, up = torch.einsum("th,ehi->tei", x, self.w_gate), torch.einsum("th,ehi->tei", x, self.w_up)
        y = torch.einsum("tei,eih->teh", F.silu(gate) * up, self.w_down)
        return torch.einsum("te,teh->th", gates, y)


@style("all_experts_einsum_gate_in_contraction", **BATCHED)
class EinsumOneContraction(Simple):
    """[B, S, H]; gate, projection down and sum over experts in one einsum."""

    act = staticmethod(lambda h: F.relu(h).pow(2))
    E = 6

    def forward(self, x):
        ids, weights = self.router(x.view(-1, H))
        gates = torch.einsum("tke,tk->te", F.one_hot(ids, self.E).to(x.dtype), weights).view(*x.shape[:2], self.E)
        h = self.act(torch.einsum("bsh,eih->bsei", x, self.up))
        return torch.einsum("bse,bsei,ehi->bsh", gates, h, self.down)


@style("all_experts_broadcast_matmul")
class BroadcastMatmul(Apart):
    """``matmul`` broadcasts one row over all experts: [T, 1, 1, H] @ [E, H, I]."""

    route = SigmoidWithBias

    def forward(self, x):
        ids, weights = self.router(x)
        gates = x.new_zeros(x.shape[0], self.E).scatter_add(1, ids, weights)
        rows = x[:, None, None, :]
        y = torch.matmul(geglu(rows @ self.w_gate, rows @ self.w_up), self.w_down).squeeze(2)
        return torch.bmm(gates.unsqueeze(1), y).squeeze(1)


@style("all_experts_broadcast_turned_table_llama4")
class BroadcastTurned(Llama4):
    """The table is turned around before its sigmoid; rows are broadcast over the experts."""

    def forward(self, x):
        best, ids = self.router.linear(x).topk(self.K, dim=1)
        table = torch.full((x.shape[0], self.E), float("-inf")).scatter_(1, ids, best)
        scores = table.transpose(0, 1).sigmoid()
        gate, up = torch.bmm(x.unsqueeze(0) * scores.unsqueeze(-1), self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(up * F.silu(gate), self.down_proj).sum(0)


@style("all_experts_baddbmm")
class Baddbmm(MoE):
    """Biases in the products; rows expanded over the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = (
            normal(self.E, *shape) for shape in ((H, I), (1, I), (I, H), (1, H))
        )  # fmt: skip

    def expert(self, rows, e):
        return torch.tanh(rows @ self.w1[e] + self.b1[e]) @ self.w2[e] + self.b2[e]

    def forward(self, x):
        ids, weights = self.router(x)
        h = torch.baddbmm(self.b1, x.unsqueeze(0).expand(self.E, -1, -1), self.w1).tanh()
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter_add_(1, ids, weights)
        return (table.T.unsqueeze(-1) * torch.baddbmm(self.b2, h, self.w2)).sum(0)


@style("all_experts_masked_rows_einsum")
class MaskedRows(Apart):
    """Tokens are masked for every expert, and the experts' results weighted by a table."""

    act = staticmethod(swiglu)

    def forward(self, x):
        ids, weights = self.router(x)
        hot = F.one_hot(ids, self.E)
        rows = x.unsqueeze(1) * hot.sum(1).unsqueeze(-1).to(x.dtype)
        h = F.silu(torch.einsum("teh,ehi->tei", rows, self.w_gate)) * torch.einsum("teh,ehi->tei", rows, self.w_up)
        y = torch.einsum("tei,eih->teh", h, self.w_down)
        return torch.einsum("teh,te->th", y, (hot * weights.unsqueeze(-1)).sum(1))


@style("vmap_over_experts")
class VmapExperts(Apart):
    """One expert as a function of its weights, mapped over all."""

    def forward(self, x):
        ids, weights = self.router(x)

        def expert(gate, up, down):
            return self.act(x @ gate, x @ up) @ down

        every = torch.vmap(expert)(self.w_gate, self.w_up, self.w_down)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        return torch.einsum("eth,te->th", every, table)


@style("vmap_functional_call")
class VmapModules(MoE):
    """One module, called with the stacked parameters of all experts."""

    def __init__(self) -> None:
        super().__init__()
        experts = [Sequence() for _ in range(self.E)]
        stacked, _ = torch.func.stack_module_state(experts)
        self.keys = list(stacked)
        self.stacks = nn.ParameterList(nn.Parameter(each.detach()) for each in stacked.values())
        self.__dict__["one"] = experts[0].to("meta").eval()

    def expert(self, rows, e):
        parameters = {key: stack[e] for key, stack in zip(self.keys, self.stacks, strict=True)}
        return torch.func.functional_call(self.__dict__["one"], parameters, (rows,))

    def forward(self, x):
        ids, weights = self.router(x)
        every = torch.vmap(lambda given: torch.func.functional_call(self.__dict__["one"], given, (x,)))(
            dict(zip(self.keys, self.stacks, strict=True))
        )
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        return (every * table.t().unsqueeze(-1)).sum(dim=0)


@style("vmap_over_tokens")
class VmapTokens(Apart):
    """One token, its experts' weights gathered, mapped over all."""

    def forward(self, x):
        ids, weights = self.router(x)

        def token(row, chosen, scale):
            h = self.act(
                torch.einsum("h,khi->ki", row, self.w_gate[chosen]), torch.einsum("h,khi->ki", row, self.w_up[chosen])
            )
            return torch.einsum("ki,kih,k->h", h, self.w_down[chosen], scale)

        return torch.vmap(token)(x, ids, weights)
