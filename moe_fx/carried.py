"""What a loop over the experts that were hit carries from one step to the next, as plain Python values.

Such a loop is traced for a few steps, and what these do is taken for what all of them do. What is carried in tensors
shows in the graph; a counter or a flag does not, if it changes what is done in a later step only. But a step that finds
all plain values as the step before it found them does what that one did, and leaves them so: from then on nothing
changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from moe_fx.errors import ExportError

__all__ = ["Steps"]

PLAIN = (bool, int, float, complex, str, bytes, type(None))
CONTAINERS = (list, tuple, set, dict)


class Steps:
    """The steps of one loop: its plain values at the start of each, and whether it went on to the end."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.ended = False
        self.counted = False

    @classmethod
    def of_count(cls) -> Steps:
        """What is asked where the number of steps is."""
        steps = cls()
        steps.counted = True
        return steps

    def over(self, places: list[Any]) -> Iterator[Any]:
        """The places, one for each step."""
        for place in places:
            self.found.append(_plain_values(sys._getframe().f_back))
            yield place
        self.ended = True

    def check(self) -> None:
        """Raises ExportError: later steps may do something else than those that were traced."""
        if self.counted:
            raise ExportError("something depends on how many experts were hit, which is asked for")
        if not self.ended:
            raise ExportError("a loop over the experts that were hit is left before the last of them")
        for one, other in zip(self.found[1:], self.found[2:], strict=False):
            changed = [name for name in one if name in other and one[name] != other[name]]
            if changed:
                name = changed[0]
                raise ExportError(
                    f"a loop over the experts that were hit changes {name} with every step ({one[name]!r}, then "
                    f"{other[name]!r}), and so perhaps what it does after a few of them"
                )


def _plain_values(frame: FrameType | None) -> dict[str, Any]:
    """The plain values among a frame's variables, and in the modules that these name; of containers of others the
    lengths."""
    if frame is None:
        return {}
    read = frame.f_globals.keys() & {*frame.f_code.co_names}
    found = {}
    for name, value in ({each: frame.f_globals[each] for each in read} | frame.f_locals).items():
        within = vars(value) if isinstance(value, torch.nn.Module) else {}
        for key, each in ((name, value), *((f"{name}.{key}", each) for key, each in within.items())):
            if _is_plain(each):
                found[key] = each if type(each) in PLAIN else repr(each)
            elif type(each) in CONTAINERS:
                found[f"len({key})"] = len(each)
    return found


def _is_plain(value: Any) -> bool:
    if type(value) in CONTAINERS and len(value) <= 1000:
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return type(value) in PLAIN
