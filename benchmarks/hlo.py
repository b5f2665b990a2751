"""Reads from the text of a compiled program what it moves, and in how many kernels.

The text is what `compiled.as_text()` gives. A program runs the instructions of its
entry computation one after the other; each that does work is a kernel, and reads its
operands from memory and writes its result there. What a kernel does inside, a fusion
say, stays on the chip.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits of a value of each type; a token and what is opaque have none.
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
# These name, fetch or await arrays and do no work. On a TPU `copy-start` fetches an
# array onto the chip, `slice-start` a part of one, ahead of kernels that read it there.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "copy-start",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "slice-start",
    "tuple",
}
_FETCHED = {"copy-done", "slice-done"}
# Custom calls that name arrays: parts side by side, and what nothing has written yet.
_NAMED = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer)"')
# Through these an array goes as it is, if in parts.
_SAME = {"bitcast", "copy-start", "opt-barrier", "slice-start"} | _FETCHED
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, (.*)|$)"
)


class Figures(NamedTuple):
    """What a program moves and runs, on each device that it runs on.

    Attributes:
      bytes: that the kernels read and write, each array once for each kernel that takes
        or returns it.
      off_chip: those of them that go to or from main memory, and what is fetched from
        there ahead of the kernels. A TPU may have the others on the chip.
      kernels: instructions that do work, collectives among them.
      collectives: instructions that devices do together.
      cycles: the sum of what a TPU's compiler estimates for each kernel; else 0.
      copied: bytes that copies of arguments to results read and write. They are not
        among `bytes`: inside of a larger program nothing has to copy them.
      copies: how many such copies; not among `kernels`.
      copied_cycles: what is estimated for them; not among `cycles`.
    """

    bytes: int = 0
    off_chip: int = 0
    kernels: int = 0
    collectives: int = 0
    cycles: int = 0
    copied: int = 0
    copies: int = 0
    copied_cycles: int = 0

    def plus(self, other: "Figures", times: int = 1) -> "Figures":
        """Adds another part of the program, which runs a number of times."""
        return Figures(*(a + times * b for a, b in zip(self, other, strict=True)))


class Instruction(NamedTuple):
    """One line of a computation: `name = type operation(operands), rest`."""

    root: bool
    name: str
    type: str
    operation: str
    operands: list[str]
    rest: str


def size(type_: str, off_chip: bool = False) -> int:
    """The bytes of a type such as `f32[16,512]{1,0}`, or of a tuple of types.

    Args:
      type_: as the text has it.
      off_chip: leaves out arrays that a TPU has on the chip, in a memory space other
        than the main one, which the layout names: `f32[8]{0:T(128)S(1)}`.
    """
    bits = 0
    for name, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?", type_):
        if off_chip and re.search(r"S\([1-9]", layout):
            continue
        width = _BITS.get(name)
        if width is None:
            width = int(re.match(r"[a-z]+(\d+)", name)[1])
        for length in re.findall(r"\d+", shape):
            width *= int(length)
        bits += width
    return bits // 8


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Splits a program into its computations.

    Returns:
      The instructions by the computation's name, and the name of the entry.

    Raises:
      ValueError: if the text has no entry computation.
    """
    found, entry, current = {}, "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, type_, operation, operands, rest = match.groups()
            names = re.findall(r"%([\w.\-]+)", operands)
            if operation == "parameter":
                names = [operands]  # its number
            made = (bool(root), name, type_, operation, names, rest or "")
            current.append(Instruction(*made))
    if not entry:
        raise ValueError(
            "hlo.figures: the text must be that of a compiled program, with an ENTRY "
            f"computation. Got {text[:60]!r}. Pass compiled.as_text()."
        )
    return found, entry


def _called(instruction: Instruction, *keys: str) -> list[str]:
    """The computations that an instruction names under these keys."""
    found = []
    for key in keys:
        for one, several in re.findall(
            rf"{key}=(?:%?([\w.\-]+)|\{{(.*?)\}})", instruction.rest
        ):
            found += [one] if one else re.findall(r"%?([\w.\-]+)", several)
    return found


def _trips(instruction: Instruction) -> int:
    """How often a loop runs, where the compiler knows; else once."""
    known = re.search(r"known_trip_count\W+n\W+(\d+)", instruction.rest)
    return int(known[1]) if known else 1


def _names(instruction: Instruction) -> bool:
    """Whether it is a custom call that does no work."""
    return instruction.operation == "custom-call" and bool(
        _NAMED.search(instruction.rest)
    )


def _through(name: str, of: dict[str, Instruction]) -> Iterator[Instruction]:
    """Follows an array back to what made it, through what leaves it as it is."""
    while name in of:
        instruction = of[name]
        yield instruction
        if instruction.operands and (
            instruction.operation in _SAME or _names(instruction)
        ):
            name = instruction.operands[0]
        elif instruction.operation == "get-tuple-element":
            source = of.get(instruction.operands[0])
            if source is None or source.operation != "tuple":
                return
            name = source.operands[int(re.search(r"index=(\d+)", instruction.rest)[1])]
        else:
            return


def _handed_on(instructions: list[Instruction]) -> set[str]:
    """The copies of arguments that are results of the program."""
    of = {i.name: i for i in instructions}
    results = [i.name for i in instructions if i.root]
    if results and of[results[0]].operation == "tuple":
        results = of[results[0]].operands
    found = set()
    for result in results:
        *_, made = _through(result, of)
        if made.operation == "copy":
            *_, source = _through(made.operands[0], of)
            if source.operation == "parameter":
                found.add(made.name)
    return found


def _collectives(i: Instruction, parts: dict[str, list[Instruction]]) -> int:
    """Collectives: itself, and those inside of a fusion, in all that it calls."""
    inside = (c for name in _called(i, "calls") for c in parts.get(name, []))
    together = i.operation.removesuffix("-start") in _COLLECTIVES
    return together + sum(_collectives(c, parts) for c in inside)


def _read(i: Instruction, types: dict, parts: dict) -> list[tuple[int, int]]:
    """What a kernel reads of each operand, and how much of that is off the chip.

    All of it, or the slices that a fusion takes, where it takes nothing else.
    """
    called = _called(i, "calls") if i.operation == "fusion" else []
    inside = [c for name in called for c in parts.get(name, [])]
    numbers = {c.name: int(c.operands[0]) for c in inside if c.operation == "parameter"}
    whole, slices = set() if inside else set(i.operands), {}
    for c in inside:
        for name in numbers.keys() & {*c.operands, c.name if c.root else ""}:
            operand = i.operands[numbers[name]]
            if c.operation == "slice":
                slices.setdefault(operand, []).append(size(c.type))
            else:
                whole.add(operand)
    found = [(size(t), size(t, True)) for t in (types.get(n, "") for n in whole)]
    for name in slices.keys() - whole:
        of = min(sum(slices[name]), size(types.get(name, "")))  # they may overlap
        found.append((of, of if size(types.get(name, ""), True) else 0))
    return found


def figures(text: str) -> Figures:
    """Counts what a compiled program moves and runs.

    Loops count as often as they are known to run, of a choice the branch that moves
    most. Of an operand of which a fusion takes slices alone, those count; any other
    counts whole, though a kernel may read a part of it.

    Args:
      text: of the program, from `compiled.as_text()`.

    Returns:
      The figures, for each device.

    Raises:
      ValueError: if the text has no entry computation.
    """
    parts, entry = computations(text)

    def total(name: str, handed: set[str]) -> Figures:
        found, types, sources = Figures(), {}, {}
        for i in parts.get(name, []):
            types[i.name] = i.type
            sources[i.name] = types.get(i.operands[0], "") if i.operands else ""
            if i.operation in _FETCHED:
                outside = size(sources[i.operands[0]], off_chip=True) > 0
                read = size(i.type) if outside else 0
                found = found.plus(Figures(off_chip=read + size(i.type, True)))
            if i.operation in _FREE or i.operation.endswith(("-done", "-update")):
                continue
            if _names(i):
                continue
            if i.operation == "while":
                for inner in _called(i, "condition", "body"):
                    found = found.plus(total(inner, set()), _trips(i))
                continue
            if i.operation == "conditional":
                keys = "branch_computations", "true_computation", "false_computation"
                found = found.plus(max(total(n, set()) for n in _called(i, *keys)))
                continue
            if i.operation in ("call", "async-start"):
                for inner in _called(i, "to_apply", "calls"):
                    found = found.plus(total(inner, set()))
                continue
            taken = _read(i, types, parts)
            moved = size(i.type) + sum(of for of, _ in taken)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            estimate = int(cycles[1]) if cycles else 0
            if i.name in handed:
                of = Figures(copied=moved, copies=1, copied_cycles=estimate)
            else:
                off_chip = size(i.type, True) + sum(off for _, off in taken)
                of = Figures(moved, off_chip, 1, _collectives(i, parts), estimate)
            found = found.plus(of)
        return found

    return total(entry, _handed_on(parts[entry]))
