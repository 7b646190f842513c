"""The report as data and as text."""

from toys import Gathered, export

import moe_fx


def test_report_survives_json():
    result = moe_fx.report(moe_fx.transform(export(Gathered()), moe_fx.Config(quantize=moe_fx.Int8WeightOnly())))
    assert moe_fx.Report.from_json(result.to_json()) == result
    assert result.layers


def test_table_has_a_line_per_layer_and_the_reason():
    text = str(moe_fx.report(moe_fx.transform(export(Gathered()), moe_fx.Config(experts="gather"))))
    head, _, row, why = text.splitlines()
    assert head.split()[:4] == ["layer", "form", "E", "K"]
    assert "gather_bmm" in row
    assert why == "why gather: as configured"


def test_nothing_found_is_said_plainly():
    assert str(moe_fx.Report()) == "no MoE layer was found"
