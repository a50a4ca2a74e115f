"""Machine code as data: instructions with their scheduling bits, and the loops that hold matrix work.

Since Volta every instruction carries how it is scheduled (arXiv 1804.06826, section 2): cycles until the warp's next
one, the scoreboard that it releases with its result or once its operands are read, and the scoreboards that it waits
for. `nvdisasm -c -hex` prints them as the upper bits of the second word.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"\s*(\.L\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")
NO_SCOREBOARD = 7
JUMPS = ("BRA", "CALL")
ENDS = ("BRA", "EXIT", "RET", "CALL", "BRX", "JMP")
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` with its modifiers, `operands` as printed, and when its warp may go on."""

    opcode: str
    operands: str = ""
    predicate: str = ""
    stall: int = 1
    result_scoreboard: int = NO_SCOREBOARD
    operand_scoreboard: int = NO_SCOREBOARD
    waits: int = 0

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_matrix(self) -> bool:
        return self.name in MATRIX

    @property
    def is_spill(self) -> bool:
        return self.name in ("STL", "LDL")

    @property
    def never_runs(self) -> bool:
        return self.predicate == "!PT"


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in order, and the place of every label."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def target(self, at: int) -> int | None:
        """Where the instruction may jump to."""
        instruction = self.instructions[at]
        found = TARGET.search(instruction.operands) if instruction.name in JUMPS else None
        return self.labels.get(found[1]) if found else None

    def next_ones(self, at: int) -> Iterator[int]:
        """The instructions that may follow: the next one, unless this one always leaves, and a jump's target."""
        instruction = self.instructions[at]
        always_leaves = instruction.name in ENDS and not instruction.predicate
        if not always_leaves and at + 1 < len(self.instructions):
            yield at + 1
        target = self.target(at)
        if target is not None and not instruction.never_runs:
            yield target


def read(listing: str) -> Code:
    """The first kernel of `nvdisasm -c -hex`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = listing.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        if found := LINE.search(line):
            predicate, opcode, operands = found[2] or "", found[3], found[4].strip()
            word = WORD.search(following)
            instructions.append(_scheduled(opcode, operands, predicate, int(word[1], 16) if word else 0))
    return Code(tuple(instructions), {name: at for name, at in labels.items() if at < len(instructions)})


def _scheduled(opcode: str, operands: str, predicate: str, word: int) -> Instruction:
    bits = word >> 41
    return Instruction(
        opcode=opcode,
        operands=operands,
        predicate=predicate,
        stall=max(1, bits & 15),
        result_scoreboard=bits >> 5 & 7,
        operand_scoreboard=bits >> 8 & 7,
        waits=bits >> 11 & 63,
    )


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first instruction, all of its places, and one turn of it as a warp runs it."""

    head: int
    places: frozenset[int]
    turn: tuple[Instruction, ...]

    @property
    def is_matrix(self) -> bool:
        return any(instruction.is_matrix for instruction in self.turn)

    @property
    def spills(self) -> int:
        return sum(instruction.is_spill for instruction in self.turn)


def matrix_loops(code: Code) -> list[Loop]:
    """The innermost loops around matrix instructions, in the order of the code."""
    loops = [loop for loop in natural_loops(code) if loop.is_matrix]
    return [loop for loop in loops if not any(other.places < loop.places for other in loops)]


def natural_loops(code: Code) -> list[Loop]:
    """Loops whose first instruction every way in passes: what returns out of line from a wait is none."""
    before: dict[int, set[int]] = {at: set() for at in range(len(code.instructions))}
    for at in before:
        for following in code.next_ones(at):
            before[following].add(at)
    bodies: dict[int, set[int]] = {}
    for at in before:
        head = code.target(at)
        if head is None or head > at:
            continue
        body, open_ones = {head, at}, [at] if at != head else []
        while open_ones:
            fresh = before[open_ones.pop()] - body
            body |= fresh
            open_ones += fresh
        if 0 not in body or head == 0:
            bodies.setdefault(head, set()).update(body)
    return [Loop(head, frozenset(body), _turn(code, head, body)) for head, body in sorted(bodies.items())]


def _turn(code: Code, head: int, body: set[int]) -> tuple[Instruction, ...]:
    """What runs in one turn where no jump is taken that can be avoided: waits that end at once, everything copied."""
    at, places = head, []
    while at not in places:
        places.append(at)
        inside = [following for following in code.next_ones(at) if following in body]
        at = inside[0] if inside else head
    return tuple(code.instructions[place] for place in places if not code.instructions[place].never_runs)
