"""The errors a user can meet. Each message says what was asked, what was found and what to do."""

from __future__ import annotations

__all__ = ["ConfigError", "ExportError", "MoeFxError", "ProgramError", "RequirementError", "StageError"]


class MoeFxError(Exception):
    """Base of every error raised by moe_fx."""


class ConfigError(MoeFxError, ValueError):
    """A configuration names something that does not exist, or values that do not fit together."""


class ProgramError(MoeFxError, ValueError):
    """The program given is not one that this library can work on."""


class ExportError(MoeFxError):
    """A model cannot be exported, or not in a way that is certainly right for every input."""


class RequirementError(MoeFxError):
    """``Config.require`` asked for more MoE layers than were found; ``report`` says why.

    Attributes:
        report: the :class:`moe_fx.Report` with the layers found and the near misses.
    """

    def __init__(self, message: str, report: object) -> None:
        super().__init__(message)
        self.report = report


class StageError(MoeFxError):
    """A graph does not hold what its stage promises: a fault of a pass, never of the user."""
