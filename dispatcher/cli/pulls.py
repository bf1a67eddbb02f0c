"""A task that waits for its image, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dispatcher.client import TaskStatus


def pull_in_words(status: TaskStatus) -> str:
    """What it waits for and how far that is; '' for a task that waits for no image."""
    if status.state != "pulling":
        return ""
    if status.pull is not None and status.pull.active:
        return f"pulling {status.image}: {how_far(status)}"
    return f"waits for image {status.image}: {how_far(status)}"


def how_far(status: TaskStatus) -> str:
    """E.g. "12.3 of 40.0 MB, 3 of 5 layers"; "2 pulls go before it"."""
    pull = status.pull
    if pull is None:
        return "no word of its pull yet"
    if pull.cooling_seconds is not None:
        return f"registry {pull.registry} is left alone for {pull.cooling_seconds:.0f} s"
    if not pull.active:
        match pull.position:
            case 0:
                return "its pull comes next"
            case 1:
                return "1 pull goes before it"
            case count:
                return f"{count} pulls go before it"
    parts = []
    if pull.bytes_total:
        parts.append(f"{pull.bytes_done / 1e6:.1f} of {pull.bytes_total / 1e6:.1f} MB")
    if pull.layers_total:
        parts.append(f"{pull.layers_done} of {pull.layers_total} layers")
    return ", ".join(parts) or "begun"
