"""Products of merged dimensions are read as einsums over them, and are left as they were where no layer came of it."""

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import drop_no_ops, functionalize, spell, unmerge_products
from moe_fx.passes.normalize.unmerge_products import merge_products
from torch.export import Dim
from toys import Gathered

import moe_fx
from moe_fx.matcher import op_name
from moe_fx.printer import format_graph


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def exported(function, *args, dynamic=None):
    return torch.export.export(Function(function), args, dynamic_shapes=dynamic).run_decompositions()


def exported_einsum(equation, args, dynamic):
    """Its first two dimensions are dynamic."""
    terms = equation.partition("->")[0].split(",")
    sizes = [{at: Dim.AUTO for at, letter in enumerate(term) if letter in terms[0][:2]} for term in terms]
    return exported(lambda *args: torch.einsum(equation, *args), *args, dynamic=(tuple(sizes),) if dynamic else None)


def spelled(program):
    module = torch.fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    written = functionalize(module.graph)
    spell(module.graph)
    drop_no_ops(module.graph, written)
    return module, written


def unmerged(program):
    module, written = spelled(program)
    unmerge_products(module.graph, written)
    module.graph.lint()
    module.recompile()
    return module


def ops(module):
    return [op_name(node) for node in module.graph.nodes if node.op == "call_function"]


def calls(module):
    return [(node.name, node.op, node.target, str(node.args)) for node in module.graph.nodes]


def test_what_einsum_is_decomposed_to_before_and_after():
    program = exported(lambda x, w: torch.einsum("bsh,eih->bsei", x, w), torch.randn(2, 3, 4), torch.randn(5, 6, 4))
    assert_expected_inline(
        format_graph(unmerged(program)),
        """\
args_0: f32[2, 3, 4]
args_1: f32[5, 6, 4]
einsum: f32[2, 3, 5, 6] = aten.einsum('abc,dec->abde', [args_0, args_1])
return (einsum,)
""",
    )


EQUATIONS = {
    "bsh,eih->bsei": ((2, 3, 4), (5, 6, 4)),
    "bsei,eih->bseh": ((2, 3, 5, 6), (5, 6, 4)),
    "bsei,eih->bsh": ((2, 3, 5, 6), (5, 6, 4)),
    "bse,bsei,eih->bsh": ((2, 3, 5), (2, 3, 5, 6), (5, 6, 4)),
    "tk,tke,tkc->tec": ((3, 2), (3, 2, 5), (3, 2, 4)),
    "tec,th->ech": ((3, 5, 4), (3, 6)),
    "tec,ech->th": ((3, 5, 4), (5, 4, 6)),
    "tke,tk->te": ((3, 2, 5), (3, 2)),
    "abcd,dbac->ba": ((3, 3, 3, 3), (3, 3, 3, 3)),
    "abcd,cdba->dcb": ((3, 3, 3, 3), (3, 3, 3, 3)),
    "abij,bajk->abik": ((3, 3, 3, 3), (3, 3, 3, 3)),
    "xaby,bazx->yzab": ((4, 2, 2, 3), (2, 2, 5, 4)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_einsum_comes_back_and_is_the_same(equation, dynamic):
    # Of the last equations all sizes are equal: nothing but the order tells the dimensions apart.
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(*shape, generator=generator) for shape in EQUATIONS[equation]]
    program = exported_einsum(equation, args, dynamic)
    module = unmerged(program)
    assert "aten::einsum" in ops(module)
    assert "aten::bmm" not in ops(module)
    (result,) = module(*args)
    torch.testing.assert_close(result, torch.einsum(equation, *args))
    for node in module.graph.nodes:
        if op_name(node) in ("aten::einsum", "aten::squeeze"):
            values = torch.fx.node.map_arg(node.args, lambda operand: operand.meta["val"])
            with node.meta["val"].fake_mode:
                expected = node.target(*values)
            assert str(expected.shape) == str(node.meta["val"].shape)


def test_dimensions_of_size_1_that_the_result_lacks_are_taken_away():
    x, w = torch.randn(2, 3, 1, 4), torch.randn(5, 1, 4, 6)

    def function(x, w):
        return torch.einsum("bsh,ehi->bsei", x.squeeze(2), w.squeeze(1))

    module = unmerged(exported(function, x, w))
    assert "aten::bmm" not in ops(module)
    torch.testing.assert_close(module(x, w)[0], function(x, w))


def test_dimensions_of_size_1_of_operands_and_result_stay():
    # Of a single token, its dimension would be lost.
    program = exported(lambda x, w: torch.einsum("bsh,ehi->bsei", x, w), torch.randn(1, 1, 4), torch.randn(5, 4, 6))
    assert calls(unmerged(program)) == calls(spelled(program)[0])


@pytest.mark.parametrize("product", ["mm", "linear", "matmul"])
def test_a_sum_over_merged_dimensions(product):
    x, w = torch.randn(3, 4, 5), torch.randn(4, 5, 6)

    def function(x, w):
        rows, matrix = x.reshape(3, 20), w.reshape(20, 6)
        if product == "linear":
            return torch.nn.functional.linear(rows, matrix.t())
        return getattr(torch, product)(rows, matrix)

    module = unmerged(torch.export.export(Function(function), (x, w)))
    assert [node.args for node in module.graph.nodes if op_name(node) == "aten::einsum"]
    torch.testing.assert_close(module(x, w)[0], function(x, w))


def test_a_linear_of_merged_rows_stays():
    def function(x, w):
        return torch.mm(x.reshape(6, 4), w).reshape(2, 3, 5)

    program = exported(function, torch.randn(2, 3, 4), torch.randn(4, 5))
    assert calls(unmerged(program)) == calls(spelled(program)[0])


def sum_in_another_order(x, w):
    return torch.bmm(x.reshape(1, 3, 4 * 5), w.permute(1, 0, 2).reshape(1, 5 * 4, 6))


def batch_cut_differently(x, w):
    return torch.bmm(x.reshape(12, 2, 3), w.reshape(12, 3, 4)).reshape(4, 3, 2, 4)


def columns_cut_with_rows(x, w):
    return torch.bmm(x.reshape(1, 2 * 3, 4), w).reshape(1, 2, 9, 5)


def rows_cut_otherwise(x, w):
    return torch.bmm(x.reshape(1, 2 * 3, 4), w).reshape(3, 2, 15)


def rows_not_cut(x, w):
    return torch.bmm(x.reshape(1, 2 * 3, 4), w)[0].relu()


def read_twice(x, w):
    product = torch.bmm(x.reshape(1, 2 * 3, 4), w)
    return product.reshape(2, 3, 15), product.relu()


def plain(x, w):
    return torch.bmm(w[[0, 1, 1]], x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    ("function", "x", "w"),
    [
        (sum_in_another_order, (3, 4, 5), (4, 5, 6)),
        (batch_cut_differently, (4, 3, 2, 3), (2, 6, 3, 4)),
        (columns_cut_with_rows, (2, 3, 4), (1, 4, 15)),
        (rows_cut_otherwise, (2, 3, 4), (1, 4, 15)),
        (rows_not_cut, (2, 3, 4), (1, 4, 15)),
        (read_twice, (2, 3, 4), (1, 4, 15)),
        (plain, (3, 4), (2, 5, 4)),
    ],
)
def test_other_products_stay(function, x, w):
    program = exported(function, torch.randn(*x), torch.randn(*w))
    assert calls(unmerged(program)) == calls(spelled(program)[0])


def test_of_a_sum_in_another_order_the_order_is_kept():
    # Both sizes are 4: what is summed is x[t, a, b] * w[b, a, n].
    x, w = torch.randn(3, 4, 4), torch.randn(4, 4, 6)
    module = unmerged(exported(sum_in_another_order_of_4, x, w))
    assert "aten::einsum" in ops(module)
    torch.testing.assert_close(module(x, w)[0], sum_in_another_order_of_4(x, w))


def sum_in_another_order_of_4(x, w):
    return torch.bmm(x.reshape(1, 3, 16), w.permute(1, 0, 2).reshape(1, 16, 6)).reshape(3, 6)


def test_a_product_of_memory_that_is_written_stays():
    def function(x, w):
        product = torch.bmm(x.reshape(1, 6, 4), w.clone().reshape(1, 4, 15)).reshape(2, 3, 15)
        w.mul_(2)
        return product

    program = torch.export.export(Function(function), (torch.randn(2, 3, 4), torch.randn(4, 15)))
    module, written = spelled(program)
    assert written
    before = calls(module)
    unmerge_products(module.graph, written)
    assert calls(module) == before


@pytest.mark.parametrize("equation", EQUATIONS)
def test_what_no_layer_came_of_is_written_back(equation):
    args = [torch.randn(*shape) for shape in EQUATIONS[equation]]
    program = exported_einsum(equation, args, dynamic=True)
    module, written = spelled(program)
    before = calls(module)
    unmerge_products(module.graph, written)
    merge_products(module.graph)
    module.graph.lint()
    assert sorted(calls(module), key=str) == sorted(before, key=str)
    module.recompile()
    torch.testing.assert_close(module(*args)[0], torch.einsum(equation, *args))


def test_attention_beside_a_layer_stays_as_it_is():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = Gathered()

        def forward(self, x):
            heads = x.reshape(-1, 2, x.shape[-1] // 2)
            scores = torch.einsum("qhd,khd->hqk", heads, heads).softmax(-1)
            return self.moe(torch.einsum("hqk,khd->qhd", scores, heads).reshape(x.shape) + x)

    model, x = Block().eval(), torch.randn(5, 8)
    program = torch.export.export(model, (x,)).run_decompositions()
    after = moe_fx.transform(program, moe_fx.Config(require=1))
    assert "aten::einsum" not in ops(after.graph_module)
    assert ops(after.graph_module).count("aten::bmm") >= 2
    torch.testing.assert_close(after.module()(x), model(x))
