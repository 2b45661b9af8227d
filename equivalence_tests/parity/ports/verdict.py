"""The findings of a comparison of two networks, as data and as text."""

from typing import NamedTuple

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.engine import Row
from equivalence_tests.parity.ports.faults import Fault
from equivalence_tests.parity.ports.mapping import Mapping
from flax_resnet.text import listed

UNKNOWN = "no known cause"

MOST_NAMES = 4
"""Layers of a group that a line names; the report page names all."""


class Report(NamedTuple):
    """The result of `compare_models`."""

    verdict: str
    """"equal", "divergent" or "undecided". Undecided means that no difference was found, but the
    inputs would hide a fault; or that tensors of both networks have no counterpart."""

    faults: list[Fault]
    """Every layer that differs, compared with equal inputs on both sides."""

    hidden: list[str]
    """Reasons why a fault could have been hidden, one sentence each."""

    rows: dict[str, list[Row]]
    """{"evaluation" or "training": differences of all tensors}. Here each network runs from the
    images to the logits with its own activations."""

    mapping: Mapping
    """The array of JAX that belongs to each tensor of PyTorch."""

    image_size: tuple[int, int]
    """(H, W) of the images."""

    explained: bool
    """True if PyTorch's network computes what JAX's computes once the causes are put into it."""

    notes: list[str] = []
    """Further remarks, one sentence each."""

    @property
    def largest(self) -> float:
        """The largest relative difference of a tensor."""
        return max(row.norm_relative for part in self.rows.values() for row in part)

    def groups(self) -> dict[str, list[str]]:
        """{cause: layers that have it, by PyTorch's names}; alternatives are joined by "or"."""
        found = {}
        for fault in self.faults:
            names = found.setdefault(" or ".join(fault.causes) or UNKNOWN, [])
            if fault.module not in names:
                names.append(fault.module)
        return found

    def jax_name(self, module: str) -> str:
        """JAX's path of the tensors of one of PyTorch's modules; "" if it has none."""
        for name, parts in self.mapping.pieces.items():
            if name.rpartition(".")[0] == module:
                return parts[0].leaf.rpartition("[")[0] or parts[0].leaf
        return ""

    def divergent_layers(self) -> list[dict]:
        """The faults as data, each with the layer's names on both sides."""
        return [
            {
                "torch_name": fault.module,
                "jax_name": self.jax_name(fault.module),
                "phase": fault.phase,
                "mode": fault.mode,
                "relative": fault.error,
                "causes": fault.causes,
                "before": list(fault.before),
            }
            for fault in self.faults
        ]

    def sentence(self) -> str:
        """The verdict in one line."""
        if self.verdict == "equal":
            return f"equal: every tensor agrees to rounding, {self.largest:.1e} at most"
        if self.verdict == "undecided":
            no_difference = "no difference, but " if self.largest <= tolerances.PORT else ""
            return f"undecided: {no_difference}{listed(self.hidden)}"
        if not self.faults:
            return f"divergent: no layer differs, but {'; '.join(self.notes)}"
        layers = {fault.module for fault in self.faults}
        causes = len(self.groups())
        many = "s" if causes > 1 else ""
        return f"divergent: {len(layers)} layer{'s differ' if len(layers) > 1 else ' differs'}" + (
            f" by {causes} cause{many}; put into PyTorch's network, "
            f"{'they explain' if causes > 1 else 'it explains'} every difference"
            if self.explained and self.largest > tolerances.PORT
            else f", first {self.faults[0].module} ({self.faults[0].mode} mode)"
        )

    def lines(self) -> list[str]:
        """The causes with their layers, and what was left over, one line each."""
        found = [f"{cause}: {_few(self._places(cause, names))}" for cause, names in
                 self.groups().items()]  # fmt: skip
        mapping = self.mapping
        found += [f"not in JAX: {n} {_shape(s)}" for n, s in mapping.unplaced.items()]
        found += [f"in JAX only: {n} {_shape(s)}" for n, s in mapping.extra.items()]
        return [*found, *mapping.ambiguous, *self.notes]

    def _places(self, cause: str, names: list[str]) -> list[str]:
        """The names, those without a cause with what else may be wrong there."""
        if cause != UNKNOWN:
            return names
        before = {f.module: f.before for f in self.faults if f.before and not f.causes}
        return [f"{n} (or {listed(before[n])} before it)" if n in before else n for n in names]

    def __str__(self) -> str:
        return "\n  ".join([self.sentence(), *self.lines()])

    def document(self) -> dict:
        """The report as data for JSON and for the page."""
        rows = {
            mode: [row._asdict() | {"verdict": _verdict(row)} for row in part]
            for mode, part in self.rows.items()
        }
        layers = self.divergent_layers()
        pieces = self.mapping.pieces.items()
        return {
            "verdict": self.verdict,
            "first": layers[0] if layers else None,
            "divergent_layers": layers,
            "unmatched": {"jax": list(self.mapping.extra), "torch": list(self.mapping.unplaced)},
            "explained": self.explained,
            "causes": self.groups(),
            "hidden": self.hidden,
            "unplaced": self.mapping.unplaced,
            "extra": self.mapping.extra,
            "mapping": {n: list(dict.fromkeys(part.leaf for part in parts)) for n, parts in pieces},
            "ambiguous": self.mapping.ambiguous,
            "notes": self.notes,
            "image_size": self.image_size,
            "tensors_placed": len(self.mapping.pieces),
            "largest": self.largest,
            "rows": rows,
        }


def _verdict(row: Row) -> str:
    if row.norm_relative == 0:
        return "equal"
    return "rounding" if row.norm_relative <= tolerances.PORT else "semantic"


def _few(names: list[str]) -> str:
    if len(names) <= MOST_NAMES + 1:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"


def _shape(shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
