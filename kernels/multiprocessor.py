"""A quarter of a multiprocessor, cycle by cycle: how long resident warps take for one turn of a loop.

The four quarters do the same work, so that one of them, with a quarter of the shared-memory width, stands for all.
Every cycle issues at most one instruction: of the warps whose scheduling bits, scoreboards and unit allow it, one that
is behind in its turns, else the one that issued last, else the oldest. Latencies are those of microbenchmarks
(arXiv 1804.06826, 2208.11174, 2402.13499). Not seen: bank conflicts, misses of the instruction cache, uneven traffic to
the second-level cache.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from machine_code import NO_SCOREBOARD, Instruction

QUARTERS = 4
SHARED_BYTES_PER_CYCLE = 128  # of a multiprocessor
QUEUE_CYCLES = 32  # how far the shared-memory and exponential units may lag behind what was issued to them
BARRIER_CYCLES = 20
COPY_CYCLES = 700  # an asynchronous copy from the second-level cache, under load
MATRIX_GROUP_CYCLES = 20  # from a warp group's last product to its wait
LATENCY = {"shared": 25, "exponential": 18, "memory": 500, "other": 12}
MATRIX_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)|HMMA\.(16816|1688)")
WIDTH = re.compile(r"\.(32|64|128)\b")
FLOAT_OPCODES = ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2")
SHARED_OPCODES = ("LDS", "LDSM", "STS", "STSM", "SHFL", "LDGSTS", "LDL", "STL", "ATOMS")
GLOBAL_OPCODES = ("LDG", "STG", "RED", "ATOMG")
UNSPENT = (
    "BAR",
    "WARPGROUP",
    "DEPBAR",
    "LDGDEPBAR",
    "NOP",
    "BRA",
    "CALL",
    "SYNCS",
    "MEMBAR",
    "FENCE",
    "WARPSYNC",
)


@dataclass(frozen=True)
class Machine:
    """What a multiprocessor has; matrix FLOP a cycle for 16-bit inputs, lanes of a quarter for the rest."""

    matrix_flop: int
    float_lanes: int
    other_lanes: int
    exponential_lanes: int
    shared_bytes: int
    copied_bytes: float  # a cycle from the second-level cache, all multiprocessors reading
    registers: int = 65536
    warps: int = 64


MACHINES = {
    # NVIDIA's whitepapers of A100 and H100; the second-level caches give 5120 bytes a cycle.
    "sm_80": Machine(2048, 16, 16, 4, 164 * 1024, 5120 / 108),
    "sm_90": Machine(4096, 32, 16, 4, 228 * 1024, 5120 / 132),
}


@dataclass(frozen=True)
class Cost:
    """What one instruction of one warp asks of its quarter: a unit for some cycles, and cycles until the result."""

    unit: str
    cycles: int = 1
    latency: int = 0
    shared_cycles: int = 0  # of the multiprocessor's shared memory, where the unit is another
    products: int = 0  # cycles of matrix products proper
    copied_bytes: int = 0


def cost(instruction: Instruction, machine: Machine) -> Cost:
    """The unit an instruction keeps busy and for how long."""
    name, opcode = instruction.name, instruction.opcode
    if instruction.is_matrix:
        return _matrix_cost(instruction, machine)
    if name in SHARED_OPCODES:
        num_bytes = 32 * _bytes_of_lane(opcode, name)
        cycles = max(1, num_bytes // SHARED_BYTES_PER_CYCLE)
        if name == "LDGSTS":
            return Cost("shared", cycles * QUARTERS, COPY_CYCLES, copied_bytes=num_bytes)
        return Cost("shared", cycles * QUARTERS, LATENCY["shared"])
    if name == "MUFU":
        return Cost("exponential", 32 // machine.exponential_lanes, LATENCY["exponential"])
    if name in GLOBAL_OPCODES:
        return Cost("memory", 1, LATENCY["memory"])
    if name in FLOAT_OPCODES:
        return Cost("float", 32 // machine.float_lanes)
    if name.startswith("IMAD"):
        return Cost("float", 2)
    if name in UNSPENT:
        return Cost("none", 1, BARRIER_CYCLES if name == "SYNCS" else LATENCY["other"])
    if name.startswith("U") or name in ("S2R", "S2UR", "LDC", "R2UR", "CS2R"):
        return Cost("uniform", 1, LATENCY["other"])
    return Cost("other", 32 // machine.other_lanes, LATENCY["other"])


def _bytes_of_lane(opcode: str, name: str) -> int:
    if name in ("LDSM", "STSM"):
        return 4 * int(opcode.rsplit(".", 1)[-1]) if opcode[-1].isdigit() and opcode[-2] == "." else 4
    found = WIDTH.search(opcode)
    return int(found[1]) // 8 if found else 4


def _matrix_cost(instruction: Instruction, machine: Machine) -> Cost:
    """HMMA is one warp's product in its quarter; HGMMA that of four warps, one in each, operands in shared memory."""
    found = MATRIX_SHAPE.search(instruction.opcode)
    if found is None:
        raise ValueError(f"{instruction.opcode}: a matrix instruction of unknown shape")
    quarter_flop = machine.matrix_flop // QUARTERS
    if instruction.name != "HGMMA":
        depth = int(found[4][3:]) if found[4] else int(found[3])
        cycles = 2 * 16 * 8 * depth // quarter_flop
        return Cost("matrix", cycles, products=cycles)
    rows, columns, depth = (int(found[i]) for i in (1, 2, 3))
    cycles = 2 * (rows // QUARTERS) * columns * depth // quarter_flop
    in_shared = re.match(r"R\w+, gdesc", instruction.operands)  # both operands through one descriptor
    shared_bytes = 2 * depth * (columns + (rows if in_shared else 0))
    shared_cycles = shared_bytes // SHARED_BYTES_PER_CYCLE
    return Cost("matrix", max(cycles, shared_cycles), MATRIX_GROUP_CYCLES, shared_cycles, cycles)


@dataclass
class _Warp:
    """A resident warp on its way through its turns."""

    program: int
    threads: int
    turn: list[tuple[Instruction, Cost]]
    at: int = 0
    turns: int = 0
    ready: float = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 8)
    copies: list[float] = field(default_factory=list)
    matrix_groups: list[float] = field(default_factory=list)
    matrix_end: float = 0
    ends: list[float] = field(default_factory=list)

    def may_issue(self, free: dict[str, float]) -> float:
        """The first cycle at which this warp's next instruction can issue, as far as it and its unit go."""
        instruction, price = self.turn[self.at]
        time = self.ready
        waits = instruction.waits
        board = 0
        while waits:
            if waits & 1:
                time = max(time, self.scoreboards[board])
            waits >>= 1
            board += 1
        if instruction.name == "DEPBAR":
            time = max(time, _all_but_the_last(self.copies, instruction))
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            time = max(time, _all_but_the_last(self.matrix_groups, instruction))
        elif instruction.name != "HGMMA":
            slack = QUEUE_CYCLES if price.unit in ("shared", "exponential") else 0
            time = max(time, free.get(price.unit, 0) - slack)
        return time

    def issue(self, time: float, free: dict[str, float]) -> None:
        instruction, price = self.turn[self.at]
        end = time + instruction.stall
        if price.unit != "none":
            start = max(time, free.get(price.unit, 0))
            free[price.unit] = start + price.cycles
            end = start + price.cycles + price.latency
        elif price.latency:
            end = time + price.latency
        if instruction.name == "HGMMA":
            self.matrix_end = max(self.matrix_end, end)
            if "gsb0" in instruction.operands:
                self.matrix_groups.append(self.matrix_end)
        elif instruction.name == "LDGDEPBAR":
            self.copies.append(time + COPY_CYCLES)
        elif instruction.result_scoreboard != NO_SCOREBOARD:
            board = instruction.result_scoreboard
            self.scoreboards[board] = max(self.scoreboards[board], end)
        if instruction.operand_scoreboard != NO_SCOREBOARD:
            board = instruction.operand_scoreboard
            self.scoreboards[board] = max(self.scoreboards[board], time + LATENCY["other"])
        self.ready = time + instruction.stall
        self.at += 1
        if self.at == len(self.turn):
            self.at, self.turns = 0, self.turns + 1
            self.ends.append(time)


def _all_but_the_last(ends: list[float], instruction: Instruction) -> float:
    """When all groups but the newest few, the instruction's last operand, have ended."""
    kept = int(instruction.operands.rsplit(",", 1)[-1].strip(), 16)
    done = ends[: len(ends) - kept]
    return done[-1] if done else 0


def cycles_of_a_turn(programs: Sequence[Sequence[Sequence[Instruction]]], machine: Machine) -> float:
    """Cycles in which every resident program does one turn: `programs[i]` holds the turns of its warps in a quarter.

    Programs start apart from one another, as those on a busy multiprocessor do; the mean is over the middle turns.
    """
    warps = [
        _Warp(program, len(turns), [(instruction, cost(instruction, machine)) for instruction in turn])
        for program, turns in enumerate(programs)
        for turn in turns
    ]
    for warp in warps:
        warp.ready = warp.program * sum(price.cycles for _, price in warp.turn) / max(1, len(programs))
    warm, turns = 4, 12
    free: dict[str, float] = {}
    arrived: dict[tuple[int, str], list[_Warp]] = {}
    now, last = 0.0, None
    while any(warp.turns < turns for warp in warps):
        best, first = None, (float("inf"), 0, False)
        for warp in warps:
            place = (max(now, warp.may_issue(free)), warp.turns, warp is not last)
            if place < first:
                best, first = warp, place
        assert best is not None, "every warp waits at a barrier"
        best_time = first[0]
        instruction = best.turn[best.at][0]
        best.issue(best_time, free)
        now, last = best_time + 1, best
        if instruction.opcode.startswith("BAR.SYNC"):
            _meet(best, instruction, best_time, arrived)
    return sum((warp.ends[turns - 1] - warp.ends[warm - 1]) / (turns - warm) for warp in warps) / len(warps)


def _meet(
    warp: _Warp, instruction: Instruction, time: float, arrived: dict[tuple[int, str], list[_Warp]]
) -> None:
    """Holds a warp at a barrier until the last of those that share it arrives."""
    barrier, _, threads = instruction.operands.partition(",")
    wanted = int(threads, 16) // (32 * QUARTERS) if threads else warp.threads
    waiting = arrived.setdefault((warp.program, barrier), [])
    waiting.append(warp)
    if len(waiting) < wanted:
        warp.ready = float("inf")
        return
    for member in waiting:
        member.ready = time + BARRIER_CYCLES
    waiting.clear()
