"""The logits among the values that a network of either framework returns."""

from collections.abc import Collection, Mapping
from typing import Any

from flax_resnet.errors import InputError


def candidates(output, batch: int, is_float) -> dict[str, Any]:
    """The values that may be logits, arrays of floats [batch, classes], by their places.

    Args:
      is_float: tells whether an array holds floats.
    """
    if hasattr(output, "logits"):
        return candidates(output.logits, batch, is_float)
    if isinstance(output, Mapping) and "logits" in output:
        return candidates(output["logits"], batch, is_float)
    if isinstance(output, Mapping | tuple | list):
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        found = {key: candidates(value, batch, is_float) for key, value in items}
        return {f"[{key!r}]{place}": v for key, part in found.items() for place, v in part.items()}
    shape = getattr(output, "shape", ())
    fits = len(shape) == 2 and shape[0] == batch and is_float(output)
    return {"": output} if fits else {}


def logits(output, batch: int, is_float, side: str, classes: Collection[int] = ()):
    """The only value that may be logits, or the only one with the other network's classes.

    Args:
      side: words that begin an error, for example "the network".
      classes: numbers of classes that the other network may have.

    Raises:
      InputError: there is no such value, or there are several.
    """
    found = candidates(output, batch, is_float)
    if len(found) > 1:
        fitting = {place: v for place, v in found.items() if v.shape[1] in classes}
        found = fitting if len(fitting) == 1 else found
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise InputError(f"{side} returns {shown(output)}, not logits [{batch}, classes]")
    values = ", ".join(f"{place} {list(v.shape)}" for place, v in found.items())
    raise InputError(f"{side} returns several values that may be logits: {values}; return one")


def others(output, chosen, is_float) -> list[str]:
    """The places of all arrays of floats but the chosen one."""
    if isinstance(output, Mapping | tuple | list):
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        found = [(key, others(value, chosen, is_float)) for key, value in items]
        return [f"[{key!r}]{place}" for key, places in found for place in places]
    return [""] if output is not chosen and hasattr(output, "shape") and is_float(output) else []


def shown(output) -> str:
    """The shapes of arrays, and the types of anything else."""
    if hasattr(output, "shape"):
        return f"{getattr(output.dtype, 'name', '')}{list(output.shape)}"
    if isinstance(output, tuple | list) and output:
        return f"({', '.join(shown(value) for value in output)})"
    if isinstance(output, Mapping) and output:
        return "{" + ", ".join(f"{key!r}: {shown(v)}" for key, v in output.items()) + "}"
    return type(output).__name__
