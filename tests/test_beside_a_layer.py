"""What stands beside a layer computes what it did: the graph around layers is rewritten as well, unchecked."""

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim
from toys import Gathered

import moe_fx

H, E = 8, 4


def twice(x):
    """The numbers of two rows for each token."""
    return torch.arange(2 * x.shape[0], device=x.device) // 2


#: of tokens [T, 8], ids [T, 2], a matrix [8, 8] and a bias [8]
BESIDE = {
    "half of the features added": lambda x, ids, w, b: (
        torch.zeros_like(x).scatter_add(0, twice(x)[:, None].expand(-1, H // 2), x[twice(x)].cos())
    ),
    "half of the features put": lambda x, ids, w, b: (
        torch.zeros_like(x).scatter(0, x[:, 0].argsort()[:, None].expand(-1, H // 2), x.cos())
    ),
    "half of the features read": lambda x, ids, w, b: x.gather(0, (ids[:, :1] * 0).expand(-1, H // 2)),
    "rows added to wider ones": lambda x, ids, w, b: (
        x.new_zeros(x.shape[0], H + 1).scatter_add(0, twice(x)[:, None].expand(-1, H), x[twice(x)])[:, 1:]
    ),
    "numbers added several times": lambda x, ids, w, b: torch.add(torch.add(x, x.cos(), alpha=2), x.sin(), alpha=0.5),
    "numbers multiplied into a table": lambda x, ids, w, b: x.scatter(1, ids, 3.0, reduce="multiply"),
    "a bag without its last row": lambda x, ids, w, b: F.embedding_bag(ids, w[:E], mode="sum", padding_idx=-1),
    "a bag": lambda x, ids, w, b: F.embedding_bag(ids, w, mode="sum", per_sample_weights=x[:, :2]),
    "one-hot rows that are returned": lambda x, ids, w, b: F.one_hot(ids, E),
    "one-hot rows as numbers": lambda x, ids, w, b: F.one_hot(ids.clamp(max=2), E).permute(2, 0, 1).float(),
    "a matrix moved nowhere": lambda x, ids, w, b: torch.mm(x, w.permute(0, 1)),
    "a matrix with one dimension exchanged for itself": lambda x, ids, w, b: torch.mm(x, w.transpose(0, -2)),
    "a matrix turned around": lambda x, ids, w, b: torch.mm(x, w.permute(-1, 0)),
    "a tensordot": lambda x, ids, w, b: torch.tensordot(x, w, dims=1),
    "one number for all features": lambda x, ids, w, b: torch.addmm(b[:1], x, w.t()),
    "factors of fewer digits": lambda x, ids, w, b: (
        torch.addcmul(x[:, :2], ids.add(99).to(torch.uint8), ids.add(9).to(torch.uint8))
    ),
    "a bias multiplied": lambda x, ids, w, b: torch.addmm(b, x, w.t(), beta=2, alpha=3),
    "a convolution of neighbours": lambda x, ids, w, b: F.conv1d(x.t()[None], w[:, :, None].repeat(1, 1, 3), padding=1),
    "a convolution of places": lambda x, ids, w, b: F.conv1d(x.t()[None], w[:, :2, None], b, groups=E),
    "a maximum": lambda x, ids, w, b: (x - x.max(-1, keepdim=True).values).softmax(-1).max(-1).indices,
    "ids halved": lambda x, ids, w, b: x[(ids.float() / 2).floor().long()[:, 0]] * (ids.float() / 2 == 1).any(-1, True),
    "places of a mask": lambda x, ids, w, b: (
        x.index_add(0, torch.where((ids == 1).any(-1))[0] * 0, x[(ids == 1).any(-1)])
    ),
}  # fmt: skip


def under_autocast(function):
    def within(x, ids, w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(x, ids, w, b)

    return within


UNDER_AUTOCAST = {
    "a bilinear": lambda x, ids, w, b: F.bilinear(x, x.cos(), torch.stack([w] * 3), b[:3]),
    "a loss": lambda x, ids, w, b: F.binary_cross_entropy_with_logits(F.linear(x, w), x.sigmoid(), reduction="none"),
    "a cell that remembers": lambda x, ids, w, b: torch.rnn_tanh_cell(x, x.cos(), w, w.t(), b, b),
    "a convolution turned around": lambda x, ids, w, b: F.conv_transpose1d(x.t()[None], w[:, :, None]),
    "rows between others": lambda x, ids, w, b: F.interpolate(F.linear(x, w)[None], scale_factor=2),
    "factors of fewer digits": lambda x, ids, w, b: torch.addcmul(x, F.linear(x, w), F.linear(x.cos(), w)),
}
BESIDE |= {f"{name} under autocast": under_autocast(function) for name, function in UNDER_AUTOCAST.items()}


class Beside(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer, self.of = Gathered(), BESIDE[name]
        self.w, self.b = torch.nn.Parameter(torch.randn(H, H)), torch.nn.Parameter(torch.randn(H))

    def forward(self, x):
        ids, _ = self.layer.route(x)
        return self.layer(x), self.of(x, ids, self.w, self.b)


@pytest.mark.parametrize("name", BESIDE)
@torch.no_grad()
def test_what_stands_beside_a_layer_computes_what_it_did(name):
    torch.manual_seed(0)
    model = Beside(name).eval()
    program = torch.export.export(model, (torch.randn(7, H),), dynamic_shapes=({0: Dim.AUTO},))
    for each in (program, program.run_decompositions()):
        after = moe_fx.transform(each, moe_fx.Config(require="all"))
        for tokens in (7, 12):
            x = torch.randn(tokens, H)
            (want, beside), (have, kept) = each.module()(x), after.module()(x)
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(kept, beside, rtol=1e-5, atol=1e-5)
