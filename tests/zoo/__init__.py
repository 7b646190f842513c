"""Tiny models of every MoE family in transformers, with random weights: no download."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

import moe_fx
from zoo.families import FAMILIES, TINY

FORMS = ("eager", "batched_mm", "grouped_mm")


def module_of(family: str) -> Any:
    """The module with the family's classes.

    Raises:
        ImportError: this version of transformers does not have the family.
    """
    name = FAMILIES[family].get("module", family)
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def forms(family: str) -> tuple[str, ...]:
    """How the family's experts can be written."""
    found: tuple[str, ...] = FAMILIES[family].get("forms", FORMS)
    return found


def num_layers(family: str) -> int:
    return FAMILIES[family].get("layers", 2)


def build(family: str, form: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The family's model, or its MoE layer alone, in eval mode and the same every time. ``form``: of its experts."""
    entry, module = FAMILIES[family], module_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if "model" in entry:
            model_class = getattr(module, entry["model"])
            config = _config(model_class.config_class, entry)
            written = dict(experts_implementation=form) if "forms" not in entry else {}
            model = model_class._from_config(config, attn_implementation="eager", **written)
        else:
            config = _config(getattr(module, entry["of"]), entry)
            config._experts_implementation = form
            model = getattr(module, entry["block"])(config, *entry.get("args", ()))
        model = model.to(dtype).eval()
        if "block" in entry:
            keep_classifier(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.uniform_(0.5, 1.5)
            for name, buffer in model.named_buffers():
                if name.endswith("bias"):  # of the choice of experts: zeros unless trained
                    buffer.uniform_(-0.2, 0.2)
                elif name.endswith("tid2eid"):  # experts by token id
                    buffer.copy_(torch.rand(*buffer.shape[:1], TINY["n_routed_experts"]).topk(buffer.shape[1]).indices)
    return FirstOutput(model) if entry.get("first_output") else model


def keep_classifier(block: torch.nn.Module) -> None:
    """Some routers cast their classifier to float32 in every call, which torch.export refuses: here it is cast once."""
    for name, module in block.named_modules():
        if name.endswith("classifier"):
            module.float()
            module.to = lambda *_, module=module: module


class FirstOutput(torch.nn.Module):
    """A model without the cache that it cannot help to return."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.model(input_ids=input_ids)[0]
        return first


def _config(config_class: Any, entry: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(config_class)}
    tiny = {name: value for name, value in TINY.items() if name in fields}
    return config_class(**{**tiny, **entry.get("config", {})})


def inputs(family: str, shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Token ids; for a MoE layer alone, hidden states."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[family].get("embedded"):
        return dict(inputs_embeds=torch.randn(*shape, TINY["hidden_size"], generator=generator).to(dtype))
    if "model" in FAMILIES[family]:
        return dict(input_ids=torch.randint(3, 90, shape, generator=generator))
    if family == "vitpose_backbone":  # the expert is chosen by whole images
        indices = torch.randint(TINY["num_experts"], (shape[0], 1, 1), generator=generator)
        return dict(
            hidden_state=torch.randn(*shape, TINY["hidden_size"], generator=generator).to(dtype), indices=indices
        )
    return dict(hidden_states=torch.randn(*shape, TINY["hidden_size"], generator=generator).to(dtype))


def exported(family: str, form: str, dtype: torch.dtype = torch.float32, dynamic: bool = True) -> ExportedProgram:
    """The model as training IR. A loop over experts needs moe_fx.export; all else is torch.export's."""
    kwargs = inputs(family, (2, 5), dtype=dtype)
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in kwargs} if dynamic else None
    with torch.no_grad():
        if form == "eager":
            return moe_fx.export(build(family, form, dtype), (), kwargs, dynamic_shapes=shapes)
        return torch.export.export(build(family, form, dtype), (), kwargs, dynamic_shapes=shapes, strict=False)


def output(callable_model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The logits, or whatever else comes first, in float32."""
    with torch.no_grad():
        result = callable_model(**kwargs)
    if isinstance(result, dict):  # ModelOutput is one too
        result = result["logits"] if "logits" in result else next(iter(result.values()))
    return (result if isinstance(result, torch.Tensor) else result[0]).float()
