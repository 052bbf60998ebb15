"""Collectives of a compiled program, read from its text: how often, how many bytes, between which devices.

XLA's own cost analysis counts the body of a loop once; here everything within a `while` counts as often as it turns.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16}  # the rest say it in their names: s4, u8, f32, c64
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    """Attributes behind the operands."""
    root: bool
    literal: str = ""
    """What stands in the brackets: the value of a constant, the number of a parameter."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one place in the program."""

    kind: str
    name: str
    times: int
    """How often it runs in a step."""
    bytes: float
    """Of one run and device: the gathered result of an all-gather, of all else what goes in."""
    group: tuple[int, ...]
    """The first group of devices, numbered in the order of the mesh."""
    loops: int
    """Loops around it."""
    hoistable: bool
    """Within a loop, and the same at every turn."""
    source: str = ""
    """The operation that it was made of, as JAX names it."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by the usual ring algorithms (Thakur et al., 2005)."""
        n = len(self.group)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.times * self.bytes * share.get(self.kind, (n - 1) / n)


Program = dict[str, list[Instruction]]


def shape_bytes(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple, as XLA writes its shape: `bf16[8,128]{1,0}` is 2048."""
    total = 0.0
    for kind, sizes in _SHAPE.findall(shape):
        bits = _BITS.get(kind) or int((re.search(r"\d+", kind) or [0])[0])
        total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def parse(text: str) -> tuple[Program, str]:
    """Computations by name, and the name of the one that the program starts with."""
    program: Program = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = program.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            current.append(_instruction(found[2], found[3], bool(found[1])))
    return program, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.find(" ")  # a tuple's shape has spaces
    shape, call = text[:end].strip(), text[end:].strip()
    op, _, after = call.partition("(")
    close = _closing("(" + after) - 1
    inside = after[: close - 1] if close > 0 else after
    names = _NAMES.findall(inside) or [w.strip().split(" ")[-1] for w in inside.split(",") if re.match(r"\s*[a-z]", w)]
    return Instruction(name, shape, op.strip(), tuple(names), after[max(close, 0) :], root, inside)


def _closing(text: str) -> int:
    """The place behind the bracket that closes the one at the start."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return place + 1
    return len(text)


def trips(program: Program, loop: Instruction) -> int:
    """How often a `while` turns: as the compiler notes, or the bound that its condition compares with; else 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    found = [
        int(instruction.literal)
        for name in _reached(program, condition[1] if condition else "")
        for instruction in program[name]
        if instruction.op == "constant"
        and instruction.shape.startswith(("s32[]", "u32[]", "s64[]"))
        and re.fullmatch(r"\d+", instruction.literal)
    ]
    return max(found, default=1) or 1


def _reached(program: Program, name: str) -> Iterator[str]:
    if name in program:
        yield name
        for instruction in program[name]:
            for called in _CALLED.findall(instruction.rest):
                yield from _reached(program, called)


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of an optimized program of `devices` devices, in the text that `Compiled.as_text()` gives."""
    program, entry = parse(text)
    found: list[tuple[str, Collective]] = []
    _walk(program, entry, 1, 0, devices, found, within=False)
    # The TPU compiler writes one asynchronous collective as a chain of fusions with a copy of it in each.
    return list(dict(reversed(found)).values())[::-1]


def _walk(
    program: Program,
    name: str,
    times: int,
    loops: int,
    devices: int,
    found: list[tuple[str, Collective]],
    within: bool,
) -> None:
    """Adds the collectives of a computation and of what it calls; `within`: it is no body of a loop, but called."""
    computation = program.get(name, [])
    shapes = {instruction.name: instruction.shape for instruction in computation}
    constant = _invariant(computation) if loops and not within else set()
    for instruction in computation:
        kind = instruction.op.removesuffix("-start")
        if kind in KINDS:
            collective = _collective(name, instruction, kind, shapes, times, loops, devices, constant)
            chain = re.search(r'chain_id="(\d+)"', instruction.rest)
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = f"{kind} {channel[1]} of chain {chain[1]}" if chain and channel else collective.name
            found.append((key, collective))
        if instruction.op == "while":
            turns = trips(program, instruction)
            body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
            if body:
                _walk(program, body[1], times * turns, loops + 1, devices, found, within=False)
            continue
        if instruction.op.endswith(("-done", "-update")):
            continue  # what a start has begun
        called = _CALLED.findall(instruction.rest)
        if branches := _BRANCHES.search(instruction.rest):
            called += _NAMES.findall(branches[1])
        for other in called:  # of a fusion, a call, an asynchronous start: what varies within is not followed
            _walk(program, other, times, loops, devices, found, within=True)


def _collective(
    where: str,
    instruction: Instruction,
    kind: str,
    shapes: dict[str, str],
    times: int,
    loops: int,
    devices: int,
    constant: set[str],
) -> Collective:
    group = _group(instruction.rest, devices)
    size = sum(shape_bytes(shapes.get(operand, "")) for operand in instruction.operands)
    if not size:  # operands without a line of their own: take the result
        size = shape_bytes(instruction.shape) / (len(group) if kind == "all-gather" else 1)
    if kind == "all-reduce" and "reduce-scatter" in where.replace("all-reduce-scatter", "reduce-scatter"):
        kind = "reduce-scatter"  # the TPU compiler's fusion of an all-reduce with the slice of its result
    if kind == "all-gather":
        size *= len(group)
    source = (re.findall(r'op_name="([^"]*)"', instruction.rest) or [""])[0]
    hoistable = loops > 0 and bool(instruction.operands) and set(instruction.operands) <= constant
    return Collective(kind, f"{where}/{instruction.name}", times, size, group, loops, hoistable, source)


def _invariant(body: list[Instruction]) -> set[str]:
    """Names in the body of a loop that have one value at every turn: carried through unchanged, or made of such."""
    root = next((instruction for instruction in body if instruction.root), None)
    if root is None or root.op != "tuple":
        return set()
    carried = {}
    for instruction in body:
        index = re.search(r"index=(\d+)", instruction.rest)
        if instruction.op == "get-tuple-element" and index:
            carried[instruction.name] = int(index[1])
    same = {name for name, i in carried.items() if i < len(root.operands) and root.operands[i] == name}
    pure = ("copy", "convert", "bitcast", "reshape", "transpose", "slice", "broadcast", "fusion", "constant", "iota")
    for instruction in body:  # in the order in which they are computed
        if instruction.op == "constant" or (
            instruction.op in pure and instruction.operands and set(instruction.operands) <= same
        ):
            same.add(instruction.name)
    return same


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the forms in which XLA writes them."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, found[1].split(",")))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, dims = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found[3]:
            ids = ids.transpose([int(n) for n in found[3].split(",")])
        return tuple(int(n) for n in ids.reshape(groups)[0].ravel())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        moving = set(re.findall(r"'([^']+)'", found[2]))
        if sizes and moving <= set(sizes) and ":" not in found[2]:
            ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
            return tuple(ids[tuple(slice(None) if name in moving else 0 for name in sizes)].ravel().tolist())
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return (int(found[1]), int(found[2]))
    return tuple(range(devices))


def axis_of(group: tuple[int, ...], data: int, model: int) -> str:
    """The mesh axis over which a group of devices communicates: `data`, `model`, or `data+model`."""
    rows, columns = {i // model for i in group}, {i % model for i in group}
    if len(group) > data * model:
        return "?"
    return "+".join(n for n, there in (("data", len(rows) > 1), ("model", len(columns) > 1)) if there) or "data"
