"""Names of policies that augment images automatically, and timm's notation of RandAugment."""

import dataclasses
import re

from flax_resnet.config.fields import nearest

POLICIES = ("ta_wide", "ra", "imagenet", "cifar10")
"""torchvision's names; "rand-..." is timm's notation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandPolicy:
    """timm's RandAugment, with the defaults of its notation."""

    m: float = 10
    """Mean level, of 10."""

    n: int = 2
    """Operations an image."""

    p: float = 0.5
    """Probability that an operation is applied."""

    mstd: float = 0
    """Standard deviation of the level; above 100 the level is uniform in [0, m]."""

    mmax: float = 10
    """Highest level."""

    inc: int = 0
    """True if (1) every operation gets stronger with the level."""


def rand_policy(notation: str) -> RandPolicy:
    """Parse timm's notation, such as "rand-m7-mstd0.5-inc1".

    Raises:
      ValueError: names the part that is wrong.
    """
    kinds = [field.name for field in dataclasses.fields(RandPolicy)]
    values = {}
    for part in notation.split("-")[1:]:
        found = re.fullmatch(r"([a-z]+)(\d+|\d*\.\d+)", part)
        whole = found and found[1] in ("n", "inc")
        if not found or found[1] not in kinds or (whole and "." in found[2]):
            known = ", ".join(kinds)
            raise ValueError(f"{part!r} in {notation!r} is none of {known} with a number")
        values[found[1]] = int(found[2]) if whole else float(found[2])
    policy = RandPolicy(**values)
    if not (1 <= policy.n <= 16 and policy.p <= 1 and policy.inc <= 1):
        raise ValueError(f"{notation!r}: n is 1 to 16, p at most 1, inc 0 or 1")
    return policy


def check_policy(name: str) -> str:
    """Return the name. Raises ValueError unless it names a policy."""
    if name.partition("-")[0] == "rand":
        rand_policy(name)
    elif name not in POLICIES:
        raise ValueError(f"unknown policy{nearest(name, (*POLICIES, 'rand-m7-mstd0.5'))}")
    return name
