"""moe_fx: find the Mixture-of-Experts layers of a PyTorch graph, quantize them, and write them back to run fast.

ep = torch.export.export(model, args)
q = moe_fx.transform(ep, moe_fx.Config(quantize=moe_fx.Int8WeightOnly()))
"""

from moe_fx.backend import backend
from moe_fx.capture import export
from moe_fx.compare import Comparison, compare
from moe_fx.config import Config
from moe_fx.errors import ConfigError, ExportError, MoeFxError, ProgramError, RequirementError
from moe_fx.fill import fill
from moe_fx.formats import Float8Dynamic, Float8WeightOnly, Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from moe_fx.report import Report
from moe_fx.transform import explain, register, report, transform

__all__ = [
    "Comparison", "Config", "ConfigError", "ExportError", "Float8Dynamic", "Float8WeightOnly", "Int4WeightOnly",
    "Int8Dynamic", "Int8WeightOnly", "MoeFxError", "ProgramError", "Report", "RequirementError", "backend", "compare",
    "explain", "export", "fill", "register", "report", "transform",
]  # fmt: skip
