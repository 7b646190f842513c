"""The zoo of styles: which are raised, and that what looks like one and is none stays as it is."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lookalikes_asking import LOOKALIKES
from lookalikes_choices import REASONS
from styles import STYLES
from styles.base import Style
from torch import nn
from torch.export import Dim

import moe_fx

#: decomposed, one for each spelling that decompositions have of their own; the rest is the exhaustive product
SOME_DECOMPOSED = {
    "modulelist_where_index_add": "one-hot by comparison, and columns of nonzero cut out",
    "modulelist_switch_bool_column": "a mask as numbers and as a mask again",
    "one_hot_sec_top2_deepspeed_kept_and_normalised": "masks of each choice by comparison, their products by bmm",
    "stack_gather": "a stack by cat and view",
    "router_on_another_tensor": "a stack by unsqueeze and cat",
    "stack_einsum_gate": "batch and sequence merged for a bmm",
    "grouped_mm_one_hot_offsets_index_add": "repeat_interleave by expand and clone",
    "modulelist_rows_of_batch_and_sequence_written_switch": "a number in place of ids as a tensor",
}


def products(names, some=SOME_DECOMPOSED):
    return [name if name in some else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


#: of tokens alone, which may be those of a batch of sequences
OF_TOKENS = [name for name, item in STYLES.items() if len(item.shape) == 2]


def given(shape, seed, model):
    dtype = next(model.parameters()).dtype
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exported(item):
    if isinstance(item, Style) and torch.__version__ < item.torch:
        pytest.skip(f"before {item.torch} torch.export does not trace it")
    torch.manual_seed(0)
    model = item.build().eval()
    x = given(item.shape, 1, model)
    shapes = (dict.fromkeys(range(x.dim() - 1), Dim.AUTO),) if item.dynamic else None
    export = torch.export.export if item.through == "export" else moe_fx.export
    return model, export(model, (x,), dynamic_shapes=shapes)


def inputs(item, model):
    other = (9, *item.shape[1:]) if len(item.shape) == 2 else (3, 7, *item.shape[2:])
    return [given(item.shape, seed, model) for seed in (1, 2)] + ([given(other, 3, model)] if item.dynamic else [])


def nodes(program):
    return [(node.op, node.name, node.target) for node in program.graph.nodes]


def guards(program):
    """What a program demands of the sizes it is run with, but for what is true of any."""
    modes = (value.fake_mode for node in program.graph.nodes if hasattr(value := node.meta.get("val"), "fake_mode"))
    shapes = next(modes).shape_env
    expressions = [guard.expr for guard in shapes.guards] if shapes is not None else []
    sizes = [[each.subs(dict.fromkeys(each.free_symbols, size)) for size in range(40)] for each in expressions]
    return [str(each) for each, holds in zip(expressions, sizes, strict=True) if not all(holds)]


def check_raised(item, model, program):
    item, demanded = STYLES.get(item, item), guards(program)
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    assert guards(program) == demanded
    assert len(moe_fx.report(after).layers) == item.layers
    for x in inputs(item, model):
        # bfloat16: the order of a sum and the places of its roundings may change
        tolerance = 2e-2 if x.dtype is torch.bfloat16 else 1e-5
        expected = model(x).float()
        assert (after.module()(x).float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", STYLES)
@torch.no_grad()
def test_a_style_is_raised(name):
    check_raised(name, *exported(STYLES[name]))


#: not raised where a single token is exported: dimensions of size 1 are taken for one another
NOT_OF_ONE_TOKEN = (
    "bins_chunked_by_module_deepspeed",
    "bins_read_by_module_and_stacked",
    "bins_unbound_by_module",
    "dense_stack_read_by_numbers_of_rows",
    "dense_stack_summed_by_embedding_bag",
    "gathered_projections_of_values_switchhead",
    "one_hot_bsec_bins_of_all_groups_in_a_bmm",
    "one_hot_bsec_switch_mesh_capacity",
    "one_hot_gsec_choice_by_choice_gshard",
    "one_hot_gsec_groups_of_tokens",
    "one_hot_gsec_mask_for_each_choice_gshard",
    "one_hot_gsec_ranks_of_a_token_mask",
    "one_hot_gsec_top1_by_comparison",
    "one_hot_sec_three_choices_in_a_loop",
    "one_hot_sec_top1_deepspeed",
    "one_hot_sec_top1_largest_count_item_deepspeed",
    "one_hot_sec_top2_deepspeed_kept_and_normalised",
    "one_hot_sec_top2_exclusive_counts_bfloat16",
    "one_hot_sec_top2_largest_count_int_deepspeed",
    "one_hot_switch_mesh_capacity",
    "rows_of_experts_with_norms_of_their_own",
    "sorted_split_by_differences_of_ends",
    "weighted_units_of_all_experts_matmul",
    "wide_ffn_cut_by_expert",
    "wide_ffn_of_plain_matrices",
    "wide_ffn_times_repeated_weights_with_bias",
    "wide_gated_ffn_times_expanded_weights",
)


def exported_for_one_token(name):
    item = STYLES[name]
    torch.manual_seed(0)
    model = item.build().eval()
    x = given([1] * (len(item.shape) - 1) + [item.shape[-1]], 1, model)
    return model, (torch.export.export if item.through == "export" else moe_fx.export)(model, (x,)), x


#: those of which a single token had hidden something: a parameter's, a table's or a mask's dimension
HIDDEN_BY_ONE_TOKEN = frozenset({
    "all_experts_baddbmm", "all_experts_einsum_router_static", "all_experts_in_one_linear",
    "all_experts_one_einsum_router", "all_experts_rows_times_one_hot", "binned_by_running_counts_of_a_token_mask",
    "dense_loop_mask_by_batch_and_sequence", "dense_loop_where_one_wide_ids", "dense_stack_table_slot_after_slot",
    "gathered_experts_last_einsum", "one_hot_dispatch_combine_tec_gshard", "vmap_functional_call",
})  # fmt: skip


def of_one_token(names):
    return [name if name in HIDDEN_BY_ONE_TOKEN else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


@pytest.mark.parametrize("name", of_one_token([name for name in STYLES if name not in NOT_OF_ONE_TOKEN]))
@torch.no_grad()
def test_a_style_is_raised_for_a_single_token(name):
    # No dimension then tells tokens apart from what else is of size 1.
    model, program, x = exported_for_one_token(name)
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    assert len(moe_fx.report(after).layers) == STYLES[name].layers
    for rows in (x, given(x.shape, 2, model)):
        tolerance = 2e-2 if x.dtype is torch.bfloat16 or "bfloat16" in name else 1e-5
        expected = model(rows).float()
        assert (after.module()(rows).float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", NOT_OF_ONE_TOKEN)
@torch.no_grad()
def test_a_style_that_is_not_raised_for_a_single_token_has_its_reason(name):
    _, program, _ = exported_for_one_token(name)
    after = moe_fx.transform(program)
    assert nodes(after) == nodes(program)
    told = " ".join(str(miss) for miss in moe_fx.report(after).misses)
    assert "exported with two tokens, or with any number of them" in told or "ids that are certainly distinct" in told


@torch.no_grad()
def test_experts_stacked_are_told_of_where_a_decomposed_token_hides_them():
    _, program, _ = exported_for_one_token("parameterlist_stacked_bmm")
    (miss,) = moe_fx.explain(program.run_decompositions()).misses
    assert "exported with two tokens, or with any number of them" in str(miss)


@pytest.mark.parametrize(
    "name",
    ["all_experts_repeat_bmm_llama4", "gathered_one_neuron_einsum", "gathered_top1_baddbmm", "stack_einsum_gate",
     "all_experts_baddbmm", "binned_by_running_counts_of_a_token_mask"],
)  # fmt: skip
@torch.no_grad()
def test_the_layer_of_a_single_token_is_the_same_in_every_lowering(name):
    model, program, x = exported_for_one_token(name)
    others = given(x.shape, 2, model)
    for experts in ("auto", "grouped_mm", "gather", "linear"):
        after = moe_fx.transform(program, moe_fx.Config(experts=experts, require=1))
        assert (after.module()(others) - model(others)).abs().max() <= 1e-5 * model(others).abs().max()


@torch.no_grad()
def test_layers_that_share_their_experts_share_what_these_are_quantized_to():
    model, program = exported(STYLES["dense_loop_called_twice"])
    config = moe_fx.Config(quantize=moe_fx.Int8WeightOnly(), storage="per_expert")
    after = moe_fx.transform(program, config)
    assert len(moe_fx.report(after).layers) == 2
    x = given((5, 16), 4, model)
    assert (after.module()(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()


@pytest.mark.parametrize("name", [name for name, item in STYLES.items() if item.build.__module__.endswith("orders")])
@torch.no_grad()
def test_parameters_are_in_the_order_of_the_experts_without_the_numeric_check(name):
    model, program = exported(STYLES[name])
    after = moe_fx.transform(program, moe_fx.Config(require="all", validate=False))
    for x in inputs(STYLES[name], model):
        assert (after.module()(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()


@pytest.mark.parametrize("name", products(STYLES))
@torch.no_grad()
def test_a_style_is_raised_from_core_aten(name):
    model, program = exported(STYLES[name])
    check_raised(name, model, program.run_decompositions())


class Block(nn.Module):
    """As decoders have a layer: the tokens of a batch of sequences, flattened, and what they came from added."""

    def __init__(self, inner, autocast=False):
        super().__init__()
        self.inner, self.autocast = inner, autocast

    def forward(self, x):
        tokens = F.layer_norm(x, x.shape[-1:]).view(-1, x.shape[-1])
        if not self.autocast:
            return x + self.inner(tokens).view(x.shape)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + self.inner(tokens).view(x.shape)


#: seen through the flattening, a product has two dimensions where others have one
SOME_IN_A_BLOCK = (
    "one_hot_dispatch_combine_tec_gshard", "one_hot_sec_top2_deepspeed", "stack_einsum_gate",
    "modulelist_top1_sorted_split_fairseq",
)  # fmt: skip


@pytest.mark.parametrize("name", products(OF_TOKENS, SOME_IN_A_BLOCK))
@torch.no_grad()
def test_a_style_in_a_block_is_raised_from_core_aten(name):
    item = replace(STYLES[name], shape=(2, 3, STYLES[name].shape[1]), build=lambda: Block(STYLES[name].build()))
    model, program = exported(item)
    check_raised(item, model, program.run_decompositions())


#: casts of rows that are used twice, of a bias, of what is written in place, and of parts that are written
SOME_UNDER_AUTOCAST = (
    "slot_loop_gathered_bmm", "gathered_top1_baddbmm", "gathered_einsum_bias_gpt_oss",
    "stacked_sequential_gemm_index_copy_aria", "modulelist_top1_sorted_split_fairseq",
)  # fmt: skip


#: not raised there: a vmap, which torch cannot write out in a region of autocast; a sum that is rounded with each
#: expert's product, as both are one call
NOT_UNDER_AUTOCAST = ("vmap_over_experts", "rows_multiplied_onto_the_token_and_copied")


@pytest.mark.parametrize("name", products(
    [name for name in OF_TOKENS if name not in NOT_UNDER_AUTOCAST], SOME_UNDER_AUTOCAST
))  # fmt: skip
@torch.no_grad()
def test_a_style_under_autocast_is_raised(name):
    item = replace(STYLES[name], shape=(2, 3, STYLES[name].shape[1]), build=lambda: Block(STYLES[name].build(), True))
    torch.manual_seed(0)
    model = item.build().eval()
    try:
        model(given(item.shape, 1, model))
    except RuntimeError as error:
        pytest.skip(f"the model itself does not run under autocast: {str(error)[:80]}")
    model, program = exported(item)
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    assert len(moe_fx.report(after).layers) == item.layers
    for x in inputs(item, model):
        expected = model(x)
        assert (after.module()(x) - expected).abs().max() <= 2e-2 * expected.abs().max()


@torch.no_grad()
def test_a_vmap_that_torch_cannot_write_out_is_an_error_that_says_so():
    item = STYLES["vmap_over_experts"]
    _, program = exported(replace(item, shape=(2, 3, 16), build=lambda: Block(item.build(), True)))
    with pytest.raises(moe_fx.ProgramError, match=r"without torch\.vmap: .* not by autocast \(expected scalar type"):
        moe_fx.transform(program)


@pytest.mark.parametrize("name", [name for name, each in LOOKALIKES.items() if each.through == "moe_fx.export"])
@torch.no_grad()
def test_a_look_alike_is_not_exported(name):
    with pytest.raises(moe_fx.ExportError):
        exported(LOOKALIKES[name])


@pytest.mark.parametrize("name", [name for name, each in LOOKALIKES.items() if each.through == "export"])
@torch.no_grad()
def test_a_look_alike_is_left_alone_without_the_numeric_check(name):
    # The rules themselves refuse it: with the check no more can be rewritten.
    _, program = exported(LOOKALIKES[name])
    assert nodes(moe_fx.transform(program, moe_fx.Config(validate=False))) == nodes(program)


@pytest.mark.parametrize("name", REASONS)
@torch.no_grad()
def test_a_choice_that_leads_to_no_layer_has_its_reason(name):
    _, program = exported(LOOKALIKES[name])
    assert any(REASONS[name] in str(miss) for miss in moe_fx.explain(program).misses)


@pytest.mark.parametrize("name", products(name for name, each in LOOKALIKES.items() if each.through == "export"))
@torch.no_grad()
def test_a_look_alike_is_left_alone_in_core_aten(name):
    _, program = exported(LOOKALIKES[name])
    program = program.run_decompositions()
    assert nodes(moe_fx.transform(program)) == nodes(program)
