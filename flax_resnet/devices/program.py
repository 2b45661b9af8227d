"""A compiled program as a list of kernels, read from the text that XLA prints of it.

Everything is a pure function of that text. Bytes are what a kernel reads from the memory of the
device and writes to it if nothing stays on the chip between two kernels; FLOPs are 2 per
multiply-add of convolutions and matrix products. Both are those of one device.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "send", "recv",
)  # fmt: skip

BETWEEN = "between layers"
"""The place of operations of the network that belong to no layer and no block, such as pools."""

OUTSIDE = "input and update"
"""The place of operations outside of the network."""

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency",
}  # fmt: skip
"""Operations that are no kernel: they name or regroup what is already in memory."""

_MOVING = {"parameter", "constant", "bitcast", "copy", "transpose", "tuple", "get-tuple-element"}
_KINDS_BY_CONTENT = ("convolution", "dot", "select-and-scatter", "scatter", "sort", "reduce-window",
                     "reduce")  # fmt: skip


class Instruction(NamedTuple):
    """A line of a program: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Program(NamedTuple):
    """The computations of a program by name; each is {name of an instruction: instruction}."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Kernel(NamedTuple):
    """An operation of the scheduled program, executed `times` times in one call."""

    name: str
    kind: str
    bytes: int
    flops: int

    dtype: str
    """Type of the operands of a product, of the data of a collective, else that of the result."""

    full_precision: bool
    """True if a product asks for all digits of its float32 operands."""

    layer: str
    """The name of a layer, or of a block for what is in none of its layers; `BETWEEN` or
    `OUTSIDE`."""

    phase: str
    """"forward", "backward" or ""."""

    times: int


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` prints."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            current[found[1]] = _instruction(found[1], found[2])
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    kind, rest = _cut(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    operands, attributes = _cut("(" + rest)
    names = re.findall(r"%([\w.\-]+)", operands)
    if opcode == "parameter":
        names = [operands.strip("()")]  # its number
    return Instruction(name, kind, opcode, tuple(names), attributes)


def _cut(text: str) -> tuple[str, str]:
    """Cut a text behind the bracket that closes its first one."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return text[: bracket.end()], text[bracket.end() :]
    return text, ""


def kernels(program: Program, layers: Collection[str] = ()) -> list[Kernel]:
    """All kernels of a program in the order in which it runs them.

    Args:
      layers: names of the network's layers.
    """
    walk = _executed(program, program.entry, 1)
    return [_kernel(program, own, i, times, layers) for own, i, times in walk]


def _executed(program: Program, name: str, times: int) -> Iterator[tuple[dict, Instruction, int]]:
    """(the computation, its kernel, how often it runs) of a computation and those it calls."""
    own = program.computations[name]
    for i in own.values():
        called = _called(i)
        if i.opcode == "while":
            yield from _executed(program, called["body"], times * _trips(i))
        elif i.opcode == "call":
            yield from _executed(program, called["to_apply"], times)
        elif i.opcode == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", _attribute(i, "branch_computations")):
                yield from _executed(program, branch, times)
        elif i.opcode == "async-start":
            yield from _executed(program, called["calls"], times)
        elif i.opcode not in _FREE and not re.search(r"-(done|update)$", i.opcode):
            yield own, i, times


def _called(i: Instruction) -> dict[str, str]:
    return dict(re.findall(r"\b(calls|body|to_apply)=%?([\w.\-]+)", i.attributes))


def _attribute(i: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", i.attributes)
    return found[1] if found else ""


def _trips(i: Instruction) -> int:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
    return int(found[1]) if found else 1


def _kernel(program, own, i: Instruction, times: int, layers) -> Kernel:
    inside = list(_inside(program, i))
    products = [(c, p) for c, p in inside or [(own, i)] if is_product(p)]
    names = [_origin(own, i), *(_op_name(each) for _, each in inside)]
    layer, phase = _place(names, layers)
    dtype = _dtype(products[0][0][products[0][1].operands[0]].type) if products else _dtype(i.type)
    return Kernel(
        name=i.name,
        kind=_kind(i, {_opcode(each) for _, each in inside}),
        bytes=_traffic(program, own, i),
        flops=sum(_flops(computation, product) for computation, product in products),
        dtype=dtype,
        full_precision=any("highest" in p.attributes for _, p in products),
        layer=layer,
        phase=phase,
        times=times,
    )


def _inside(program, i: Instruction) -> Iterator[tuple[dict, Instruction]]:
    """(the computation, its instruction) of all instructions in a fusion, nested ones too."""
    if i.opcode != "fusion":
        return
    own = program.computations[_called(i)["calls"]]
    for each in own.values():
        yield own, each
        yield from _inside(program, each)


def _kind(i: Instruction, inside: set[str]) -> str:
    """ "convolution", "dot", "reduce", "elementwise", "copy", a collective, or the opcode."""
    opcode = _opcode(i).removesuffix("-start")
    if opcode == "custom-call":
        target = _attribute(i, "custom_call_target")
        return "convolution" if "conv" in target else "dot" if "cublas" in target else opcode
    if opcode != "fusion":
        return "copy" if opcode in _MOVING else opcode
    content = next((kind for kind in _KINDS_BY_CONTENT if kind in inside), None)
    return content or ("copy" if inside <= _MOVING else "elementwise")


def _opcode(i: Instruction) -> str:
    """The opcode; "dot" for the convolutions by which a TPU multiplies matrices."""
    multiplies = i.opcode == "convolution" and _op_name(i).endswith("/dot_general")
    return "dot" if multiplies else i.opcode


def _origin(own: dict, i: Instruction) -> str:
    """The name of the operation that an instruction comes from, else that of its first operand: the
    compiler joins collectives, and what it joins has no name."""
    while not (name := _op_name(i)) and i.operands and i.operands[0] in own:
        i = own[i.operands[0]]
    return name


def _op_name(i: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    return found[1] if found else ""


def _place(op_names: list[str], layers) -> tuple[str, str]:
    """(layer, phase): those of the operation's own name, else the most frequent inside."""
    own, *inside = [_place_of(name, layers) for name in op_names]
    if own[0] not in (BETWEEN, OUTSIDE):
        return own
    named = Counter(place for place in inside if place[0] not in (BETWEEN, OUTSIDE))
    return named.most_common(1)[0][0] if named and own[0] == OUTSIDE else own


def _place_of(op_name: str, layers) -> tuple[str, str]:
    phase = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    found = [part for part in re.split(r"[/()]", op_name) if part in layers]
    return (found[-1] if found else BETWEEN if phase else OUTSIDE), phase


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


def arrays(kind: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(type, shape, whether it lies in the device's memory) of the arrays in a type."""
    return [
        (dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in layout)
        for dtype, shape, layout in _ARRAY.findall(kind)
    ]


def _dtype(kind: str) -> str:
    return next((dtype for dtype, *_ in arrays(kind)), "")


def _shape(kind: str) -> tuple[int, ...]:
    return arrays(kind)[0][1]


def size(kind: str, *, on_chip: bool = False) -> int:
    """Bytes of an array or a tuple of arrays in the device's memory, and if asked on the chip."""
    found = arrays(kind)
    return sum(
        _width(dtype) * math.prod(shape) for dtype, shape, outside in found if outside or on_chip
    )


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else int(dtype == "pred")


def _traffic(program, own, i: Instruction) -> int:
    """Bytes that an instruction reads and writes."""
    read = [size(own[name].type) for name in i.operands]
    if (kind := i.opcode.removesuffix("-start")) in COLLECTIVES:
        sent = sum(size(own[name].type, on_chip=True) for name in i.operands)
        gathered = size(i.type, on_chip=True) - (i.opcode.endswith("-start") and sent)
        return 2 * (gathered if kind == "all-gather" else sent)
    if i.opcode in ("copy-start", "slice-start"):  # the result names the source once more
        moved = _ARRAY.search(i.type)[0]
        return size(moved, on_chip=True) + size(moved)
    if i.opcode == "fusion":
        inside = program.computations[_called(i)["calls"]]
        read = [min(pair) for pair in zip(read, _needed(inside, len(read)), strict=True)]
    return sum(read) + size(i.type)


def _needed(inside: dict, count: int) -> list[float]:
    """Bytes that a fusion needs of each operand: less than all where it only takes a part."""
    given = {int(i.operands[0]): i for i in inside.values() if i.opcode == "parameter"}
    return [
        _taken(inside, given[number].name) * _width(_dtype(given[number].type))
        for number in range(count)
    ]


def _taken(inside: dict, name: str) -> float:
    """The number of an array's values that a fusion needs, or infinity: all of them."""
    users = [i for i in inside.values() if name in i.operands]
    return sum(_taken_by(inside, i) for i in users)


def _taken_by(inside: dict, i: Instruction) -> float:
    if i.opcode in ("gather", "dynamic-slice", "slice"):
        return math.prod(_shape(i.type))
    return _taken(inside, i.name) if i.opcode in ("convert", "bitcast") else math.inf


def is_product(i: Instruction) -> bool:
    """True if an instruction is a convolution or a matrix product."""
    if i.opcode == "custom-call":
        return bool(re.search(r"conv|cublas", _attribute(i, "custom_call_target")))
    return i.opcode in ("convolution", "dot")


def _flops(own: dict, i: Instruction) -> int:
    shapes = [_shape(own[name].type) for name in i.operands[:2]]
    result = _shape(i.type)
    if labels := _attribute(i, "dim_labels"):
        return _of_convolution(i, labels, *shapes, result)
    contracted = re.search(r'lhs_contracting_dim\w*"?[=:][{\[]"?(\d+)', i.attributes)
    return 2 * math.prod(result) * (shapes[0][int(contracted[1])] if contracted else 1)


def _of_convolution(i, labels, lhs, rhs, result) -> int:
    """FLOPs of a convolution. cuDNN describes its gradients by the convolution forward; elsewhere
    they are convolutions themselves, of images with zeros between the pixels."""
    target = _attribute(i, "custom_call_target")
    kernel, outputs = rhs, result
    if "BackwardInput" in target:
        outputs = lhs
    elif "BackwardFilter" in target:
        kernel, outputs = result, rhs
    axes = labels.split("_")[1].split("->")[0]
    each = math.prod(kernel) // kernel[axes.index("o")]
    dilation = re.search(r"lhs_dilate=([\dx]+)", i.attributes)
    zeros = math.prod(map(int, dilation[1].split("x"))) if dilation else 1
    return 2 * math.prod(outputs) * each // zeros


def collectives(found: list[Kernel]) -> list[dict]:
    """A row for each kind and type: how many, of how many bytes, how many in the forward pass."""
    rows = {}
    for kernel in found:
        if kernel.kind in COLLECTIVES:
            row = rows.setdefault((kernel.kind, kernel.dtype), Counter())
            row["count"] += kernel.times
            row["bytes"] += kernel.times * kernel.bytes // 2
            row["in_forward"] += kernel.times * (kernel.phase == "forward")
    names = ("count", "bytes", "in_forward")
    return [
        {"kind": kind, "dtype": dtype} | {name: row[name] for name in names}
        for (kind, dtype), row in sorted(rows.items())
    ]
