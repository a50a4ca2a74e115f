"""The static performance model: what a kernel's loops ask of a multiprocessor, and the share of its tensor peak.

For one turn of every innermost matrix loop and all the programs that fit a multiprocessor: cycles of each unit, and
the cycles that the turn takes when `multiprocessor.py` runs its warps against one another.
"""

from collections import Counter
from dataclasses import dataclass

from machine_code import Code, Instruction, Loop, matrix_loops
from multiprocessor import MATRIX_SHAPE, QUARTERS, Machine, cost, cycles_of_a_turn

RESERVED_BYTES = 1024  # of shared memory, a program
REGISTER_GROUP = 8  # registers of a thread are allotted in groups
BUSY = 0.8  # a unit that is busy this share of the time is what the loop waits for
UNITS = ("matrix", "shared", "copies", "issue", "float", "other", "exponential")
WAITS = ("DEPBAR", "WARPGROUP", "SYNCS")

# Of the leanest loop, without a mask, under Triton 3.6 to 3.9: what is predicted to be slower falls out of the gate.
LEAST_SHARE = {
    ("attention forward d128", "sm_80"): 0.57,
    ("attention dq d128", "sm_80"): 0.68,
    ("attention dkdv d128", "sm_80"): 0.62,
    ("attention forward d128", "sm_90"): 0.57,
    ("attention forward specialised d128", "sm_90"): 0.58,
    ("attention dq d128", "sm_90"): 0.74,
    ("attention dkdv d128", "sm_90"): 0.66,
    ("gram forward", "sm_80"): 0.54,
    ("gram backward", "sm_80"): 0.90,
    ("gram forward", "sm_90"): 0.58,
    ("gram backward", "sm_90"): 0.58,
}


@dataclass(frozen=True)
class LoopCost:
    """One turn of a loop, all resident programs together: cycles of every unit and of the turn itself."""

    units: dict[str, float]
    cycles: float
    barriers: int
    waits: int
    spills: int
    instructions: int

    @property
    def share(self) -> float:
        """Of the tensor peak."""
        return self.units["matrix"] / self.cycles

    @property
    def limiter(self) -> str:
        """The unit that is busy all the time, or what keeps all of them idle."""
        unit = max(UNITS, key=lambda name: self.units[name])
        return unit if self.units[unit] >= BUSY * self.cycles else f"waits, {unit}"


def resident_programs(registers: int, shared_bytes: int, num_warps: int, machine: Machine) -> int:
    """How many programs a multiprocessor holds at once."""
    of_a_warp = 32 * -(-registers // REGISTER_GROUP) * REGISTER_GROUP
    return max(1, min(
        machine.registers // (of_a_warp * num_warps),
        machine.shared_bytes // (shared_bytes + RESERVED_BYTES),
        machine.warps // num_warps,
    ))  # fmt: skip


def loop_costs(code: Code, num_warps: int, programs: int, machine: Machine) -> list[LoopCost]:
    """The matrix loops of a kernel; those of warp-specialised groups, four warps each, run beside one another."""
    loops = matrix_loops(code)
    if any(instruction.name == "USETMAXREG" for instruction in code.instructions):
        streamed = _streamed_bytes(loops[0]) if loops else 0
        return [loop_cost(loops, programs, machine, streamed)] if loops else []
    return [loop_cost([loop] * (num_warps // QUARTERS), programs, machine) for loop in loops]


def loop_cost(warps: list[Loop], programs: int, machine: Machine, streamed_bytes: int = 0) -> LoopCost:
    """`warps` are the loops of a program's warps in one quarter; `streamed_bytes` are copied for them by another."""
    units: dict[str, float] = dict.fromkeys(UNITS, 0)
    units["copies"] = streamed_bytes / machine.copied_bytes
    for loop in warps:
        for instruction in loop.turn:
            _add(units, instruction, machine)
    units = {unit: cycles * programs for unit, cycles in units.items()}
    kinds = Counter(instruction.name for instruction in warps[0].turn)
    return LoopCost(
        units=units,
        cycles=max(cycles_of_a_turn([[loop.turn for loop in warps]] * programs, machine), *units.values()),
        barriers=kinds["BAR"],
        waits=sum(kinds[name] for name in WAITS),
        spills=sum(loop.spills for loop in warps) // len(warps),
        instructions=len(warps[0].turn),
    )


def _add(units: dict[str, float], instruction: Instruction, machine: Machine) -> None:
    price = cost(instruction, machine)
    units["issue"] += 1
    units["shared"] += price.shared_cycles
    units["copies"] += price.copied_bytes * QUARTERS / machine.copied_bytes
    if price.unit == "matrix":
        units["matrix"] += price.products
    elif price.unit in units:
        units[price.unit] += price.cycles


def _streamed_bytes(loop: Loop) -> int:
    """What another warp copies for a turn: every second operand of the products of one group."""
    shapes = (
        MATRIX_SHAPE.search(instruction.opcode) for instruction in loop.turn if instruction.name == "HGMMA"
    )
    return sum(2 * int(shape[2]) * int(shape[3]) for shape in shapes if shape)


def leanest(loops: list[LoopCost]) -> LoopCost | None:
    """The loop without a mask: the fewest instructions for its matrix work."""
    return min(loops, key=lambda loop: loop.instructions / loop.units["matrix"], default=None)
