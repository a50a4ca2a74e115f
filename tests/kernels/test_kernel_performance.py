"""The performance model: what it reads from machine code, and its cycles against ones counted by hand."""

import pytest

from machine_code import Instruction, matrix_loops, natural_loops, read
from multiprocessor import MACHINES, cost, cycles_of_a_turn
from performance import leanest, loop_cost, loop_costs, resident_programs

A100, H100 = MACHINES["sm_80"], MACHINES["sm_90"]
NO_BOARDS = 7 << 5 | 7 << 8


def word(stall: int = 1, result: int = 7, operands: int = 7, waits: int = 0) -> str:
    """The second word of an instruction, its scheduling bits alone."""
    return f"/* 0x{(stall | result << 5 | operands << 8 | waits << 11) << 41:016x} */"


def listing(*lines: str) -> str:
    """Labels as they are, every other line an instruction at the next address, one cycle after the one before."""
    text, address = [], 0
    for line in lines:
        if line.startswith(".L"):
            text.append(line)
            continue
        text += [f"        /*{address:04x}*/      {line} ;      /* 0x0000000000000000 */", f"      {word()}"]
        address += 16
    return "\n".join(text)


def made(opcode: str, operands: str = "", **scheduling: int) -> Instruction:
    return Instruction(opcode, operands, **scheduling)


def test_scheduling_bits_as_printed_for_a_real_kernel():
    """Two instructions of an sm_80 kernel; what their bits mean was read off by hand."""
    text = """
        /*1c50*/                   HMMA.16816.F32.BF16 R52, R100.reuse, R32, RZ ;     /* 0x000000206434723c */
                                                                                     /* 0x042ff000000418ff */
        /*3bc0*/              @!P0 LDSM.16.M88.4 R32, [R105+0x8000] ;                 /* 0x008000006920783b */
                                                                                     /* 0x000e680000000200 */
    """
    product, load = read(text).instructions
    assert (product.opcode, product.operands) == ("HMMA.16816.F32.BF16", "R52, R100.reuse, R32, RZ")
    assert (product.stall, product.waits, product.result_scoreboard) == (8, 0b000010, 7)
    assert (load.name, load.predicate, load.stall, load.result_scoreboard) == ("LDSM", "!P0", 4, 1)
    assert product.is_matrix and not load.is_matrix


PRODUCT = "HMMA.16816.F32.BF16 R0, R4, R8, R0"
LOOPS = {
    "one loop": ((".L_1:", PRODUCT, "@P0 BRA `(.L_1)", "EXIT"), [(0, 2)]),
    "the trap after the exit": ((".L_1:", PRODUCT, "@P0 BRA `(.L_1)", "EXIT", ".L_2:", "BRA `(.L_2)"), [(0, 2)]),
    "the inner of two": (
        (".L_1:", "IADD3 R1, R1, 1, RZ", ".L_2:", PRODUCT, "@P0 BRA `(.L_2)", "@P1 BRA `(.L_1)", "EXIT"),
        [(1, 2)],
    ),
    "an inner loop without products": (
        (".L_1:", PRODUCT, ".L_2:", "NOP", "@P0 BRA `(.L_2)", "@P1 BRA `(.L_1)", "EXIT"),
        [(0, 4)],
    ),
    "a wait out of line": (
        ("S2R R0, SR_TID.X", ".L_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1", "@!P0 BRA `(.L_9)", ".L_2:",
         PRODUCT, "@P1 BRA `(.L_1)", "EXIT", ".L_9:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1",
         "@!P0 BRA `(.L_9)", "BRA `(.L_2)"),
        [(1, 4)],
    ),
    "left by a call": ((".L_1:", PRODUCT, "@P0 CALL.REL.NOINC `(.L_2)", "BRA `(.L_1)", ".L_2:", "EXIT"), [(0, 3)]),
    "never": ((".L_1:", PRODUCT, "@!PT LDS RZ, [RZ]", "@P0 BRA `(.L_1)", "EXIT"), [(0, 2)]),
    "no loop": ((PRODUCT, "EXIT"), []),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "want"), LOOPS.values(), ids=LOOPS)
def test_matrix_loops(lines, want):
    """Where each begins, and how many instructions a turn runs."""
    assert [(loop.head, len(loop.turn)) for loop in matrix_loops(read(listing(*lines)))] == want


def test_a_jump_into_a_loop_past_its_head_makes_it_none():
    lines = ("@P2 BRA `(.L_2)", ".L_1:", "NOP", ".L_2:", PRODUCT, "@P0 BRA `(.L_1)", "EXIT")
    assert natural_loops(read(listing(*lines))) == []


SHARED_A = "R24, gdesc[UR8], R24"
REGISTER_A = "R24, R88, gdesc[UR8].tnspB, R24"
COSTS = {
    # 16 x 8 x 16 products are 4096 FLOP; a quarter makes 512 a cycle.
    "A100 product": (made(PRODUCT.split()[0]), A100, ("matrix", 8, 8, 0)),
    # 64 x 128 x 16: 262144 FLOP at 4096 a cycle; 128 x 16 and 64 x 16 values of two bytes at 128 a cycle.
    "H100 product, both from shared memory": (made("HGMMA.64x128x16.F32.BF16", SHARED_A), H100, ("matrix", 64, 64, 48)),
    "H100 product, one from registers": (made("HGMMA.64x128x16.F32.BF16", REGISTER_A), H100, ("matrix", 64, 64, 32)),
    # 16 cycles of products, but 24 of operands.
    "H100 narrow product": (made("HGMMA.64x32x16.F32.BF16", SHARED_A), H100, ("matrix", 24, 16, 24)),
    # 512 bytes a warp, four warps at once.
    "matrix load": (made("LDSM.16.M88.4"), A100, ("shared", 16, 0, 0)),
    "transposed load of two": (made("LDSM.16.MT88.2"), A100, ("shared", 8, 0, 0)),
    "load of four bytes": (made("LDS"), A100, ("shared", 4, 0, 0)),
    "store of sixteen": (made("STS.128"), H100, ("shared", 16, 0, 0)),
    "spilled pair": (made("LDL.64"), A100, ("shared", 8, 0, 0)),
    "exponential": (made("MUFU.EX2"), A100, ("exponential", 8, 0, 0)),
    "float, 16 lanes": (made("FFMA"), A100, ("float", 2, 0, 0)),
    "float, 32 lanes": (made("FFMA"), H100, ("float", 1, 0, 0)),
    "comparison": (made("ISETP.GE.AND"), H100, ("other", 2, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize(("instruction", "machine", "want"), COSTS.values(), ids=COSTS)
def test_cost(instruction, machine, want):
    got = cost(instruction, machine)
    assert (got.unit, got.cycles, got.products, got.shared_cycles) == want


def test_an_unknown_matrix_instruction_is_named():
    with pytest.raises(ValueError, match=r"HMMA\.NEW: a matrix instruction of unknown shape"):
        cost(made("HMMA.NEW"), A100)


ONE, GROUP = made("HMMA.16816.F32"), made("HGMMA.64x128x16.F32.BF16", f"{SHARED_A}, gsb0")
WAIT = made("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
STEP = (made("FADD", stall=10), made("BAR.SYNC.DEFER_BLOCKING", "0x0"))
TURNS = {
    # name: programs of warps of instructions, machine, cycles
    "one product after another": ([[[ONE]]], A100, 8),
    "two warps share the unit": ([[[ONE], [ONE]]], A100, 16),
    "a stall of the warp alone": ([[[made("IADD3", stall=9)]]], A100, 9),
    "issue of four warps, one a cycle": ([[[made("BRA")]] * 4], A100, 4),
    # Issued at 0, ready after 8 + 18; the sum then, and four cycles to the next turn.
    "wait for an exponential": (
        [[[made("MUFU.EX2", result_scoreboard=0), made("FADD", waits=1, stall=4)]]], A100, 30,
    ),
    "shared memory is the bound": ([[[made("LDSM.16.M88.4")] * 10]], A100, 160),
    # The second warp adds two cycles after the first, waits ten, and both go on twenty after that.
    "barrier": ([[STEP, STEP]], A100, 32),
    "barrier of one warp a quarter": (
        [[[made("FADD", stall=10), made("BAR.SYNC.DEFER_BLOCKING", "0x2, 0x80")]] * 2], A100, 30,
    ),
    # 64 cycles of products, 20 to the wait's end, and the wait's own one.
    "one group waits for its products": ([[[GROUP, WAIT]]], H100, 85),
    "two groups fill the matrix unit": ([[[GROUP, WAIT], [GROUP, WAIT]]], H100, 128),
    # One group in flight: the copies of a turn are waited for in the next, 700 cycles after they began.
    "copies one turn ahead": (
        [[[made("DEPBAR.LE", "SB0, 0x0"), made("LDGSTS.E.BYPASS.128"), made("LDGDEPBAR", stall=4)]]], A100, 702,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("programs", "machine", "want"), TURNS.values(), ids=TURNS)
def test_cycles_of_a_turn(programs, machine, want):
    assert cycles_of_a_turn(programs, machine) == pytest.approx(want, abs=0.5)


RESIDENT = {
    "registers": ((255, 64 * 1024, 4, A100), 2),
    "registers of eight warps": ((183, 64 * 1024, 8, A100), 1),
    "shared memory and what each program reserves": ((128, 82 * 1024, 4, A100), 1),
    "just fits twice": ((128, 81 * 1024, 4, A100), 2),
    "warps": ((32, 0, 8, A100), 8),
    "more of it on H100": ((168, 100 * 1024, 4, H100), 2),
}


@pytest.mark.parametrize(("arguments", "want"), RESIDENT.values(), ids=RESIDENT)
def test_resident_programs(arguments, want):
    assert resident_programs(*arguments) == want


def test_a_loop_is_summed_over_the_programs_and_named_by_its_busiest_unit():
    lines = [
        ".L_1:",
        "LDSM.16.M88.4 R0, [R1]",
        PRODUCT,
        PRODUCT,
        PRODUCT,
        "LDL R7, [R1]",
        "@P0 BRA `(.L_1)",
        "EXIT",
    ]
    (got,) = loop_costs(read(listing(*lines)), 4, 2, A100)
    assert (got.units["matrix"], got.units["shared"], got.units["issue"]) == (2 * 24, 2 * 20, 2 * 6)
    assert (got.instructions, got.spills, got.barriers) == (6, 1, 0)
    assert got.cycles == pytest.approx(48, abs=1)
    assert got.limiter == "matrix"
    assert got.share == pytest.approx(1, abs=0.03)


def test_what_no_unit_explains_is_called_waits():
    lines = [".L_1:", PRODUCT, "BAR.SYNC.DEFER_BLOCKING 0x0", "@P0 BRA `(.L_1)", "EXIT"]
    (got,) = loop_costs(read(listing(*lines)), 4, 1, A100)
    assert got.limiter == "waits, matrix"
    assert got.barriers == 1


def test_specialised_groups_run_beside_one_another():
    """Two consumers, each waiting for its own products: together they fill the unit that one leaves idle."""
    turn = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    lines = (".L_1:", *turn, "@P0 BRA `(.L_1)", ".L_2:", *turn, "@P0 BRA `(.L_2)", "EXIT")
    alone = loop_costs(read(listing(*lines)), 4, 1, H100)
    together = loop_costs(read(listing("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8", *lines)), 4, 1, H100)
    assert [round(loop.share, 2) for loop in alone] == [0.74, 0.74]
    # Both multiply by the same 128 x 16 values of two bytes; 132 multiprocessors share 5120 bytes a cycle.
    assert together[0].units["copies"] == pytest.approx(105.6)
    assert together[0].share == pytest.approx(1)


def test_the_leanest_loop_has_the_fewest_instructions_for_its_products():
    def loop(*more):
        return matrix_loops(read(listing(".L_1:", PRODUCT, *more, "@P0 BRA `(.L_1)", "EXIT")))[0]

    masked, lean = (loop_cost([each], 1, A100) for each in (loop("FSEL R1, R1, R2, P0"), loop()))
    assert leanest([masked, lean]) is lean
    assert leanest([]) is None
