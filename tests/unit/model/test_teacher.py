"""The EMA teacher: against an average in fp64, swapped in and out, in bf16, and when it stands still."""

import pytest
import torch
import torch.distributed as dist
from unit.model.test_fp8 import decoded

from laver_mcore.megatron.parallel import Topology
from laver_mcore.megatron.weight_shards import Bucket
from laver_mcore.model.fp8 import Fp8Pass
from laver_mcore.model.teacher import MasterShard, Teacher, TeacherError
from laver_mcore.train.step import MIN_EXPECTED_MOVE, check_teacher_moved

WIDTH = 8


class Chunk(torch.nn.Module):
    """The parts of a pipeline chunk that the teacher looks at: two layers, a head, and parts it does not average."""

    share_embeddings_and_output_weights = True
    fp8: Fp8Pass | None = None

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        layers = [torch.nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2)]
        for number, layer in enumerate(layers, start=1):
            layer.layer_number = number
        self.language_model = torch.nn.Module()
        self.language_model.decoder = torch.nn.Module()
        self.language_model.decoder.layers = torch.nn.ModuleList(layers)
        self.vision_head = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
        self.connector = torch.nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.mask_token = torch.nn.Parameter(torch.zeros(WIDTH, dtype=dtype))

    @property
    def decoder(self) -> torch.nn.Module:
        return self.language_model.decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.decoder.layers:
            x = torch.tanh(layer(x))
        return self.vision_head(x)


@pytest.fixture(scope="module")
def topology():
    """One process that is its own tensor-parallel, pipeline and data-parallel group."""
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group([dist.get_rank()])
    sizes = dict(world_size=1, tp_size=1, pp_size=1, cp_size=1, dp_size=1, vp_size=None)
    ranks = dict(rank=0, tp_rank=0, pp_rank=0, cp_rank=0, dp_rank=0)
    groups = {f"{name}_group": group for name in ("tp", "pp", "cp", "dp", "mp", "tp_cp", "dp_cp", "replica")}
    yield Topology(**sizes, **ranks, **groups, device=torch.device("cpu"))
    if not joined:
        dist.destroy_process_group()


AVERAGED = ("language_model.", "vision_head.")


def teacher_of(chunk: Chunk, topology: Topology, **options) -> Teacher:
    buckets = [
        Bucket(places={p: (0, p.numel())}, numel=p.numel(), group=None)
        for p in chunk.parameters()
        if p.requires_grad
    ]
    return Teacher([chunk], topology, buckets, "reference", **{"averaged": AVERAGED} | options)


def make(topology, dtype=torch.float32, **options) -> tuple[Chunk, Teacher]:
    torch.manual_seed(0)
    chunk = Chunk(dtype)
    return chunk, teacher_of(chunk, topology, **options)


def walk(masters: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """A small random step of every master weight, as an optimizer takes one."""
    for master in masters.values():
        master += 0.01 * torch.randn(master.shape, generator=generator)


def masters_of(chunk: Chunk) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().float().clone() for name, parameter in chunk.named_parameters()}


def give(chunk: Chunk, masters: dict[str, torch.Tensor]) -> MasterShard:
    """Put the masters into the (rounded) parameters, and find each one's as the optimizer does."""
    found = {}
    for name, parameter in chunk.named_parameters():
        parameter.data.copy_(masters[name])
        found[parameter] = masters[name].view(-1)
    return lambda parameter, start, stop: found[parameter][start:stop]


def averaged(chunk: Chunk) -> list[str]:
    return [
        name for name, _ in chunk.named_parameters() if name.startswith(("language_model.", "vision_head."))
    ]


@pytest.mark.parametrize("offload", [False, True], ids=["on_device", "offloaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("momentum", [0.9, 0.996, 0.9999])
def test_two_hundred_moves_follow_an_average_in_fp64(topology, dtype, momentum, offload):
    """In bf16 too: the teacher averages the fp32 masters, not the rounded weights."""
    chunk, teacher = make(topology, dtype, offload=offload)
    masters = masters_of(chunk)
    wanted = {name: masters[name].double() for name in averaged(chunk)}
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        walk(masters, generator)
        before = {name: tensor.clone() for name, tensor in wanted.items()}
        distance = teacher.update(give(chunk, masters), momentum)
        for name, average in wanted.items():
            average.mul_(momentum).add_(masters[name].double(), alpha=1 - momentum)
        moved = sum((wanted[name] - before[name]).square().sum() for name in wanted).sqrt()
        assert distance.item() == pytest.approx(moved.item(), rel=1e-4)
    parameters = dict(chunk.named_parameters())
    assert len(teacher.averages) == len(wanted) == 5
    for name, average in wanted.items():
        mine = teacher.averages[parameters[name]]
        assert mine.dtype == torch.float32
        assert ((mine - average.view(-1)).norm() / average.norm()).item() < 1e-6, name


def test_an_offloaded_average_comes_back_from_the_device(topology, monkeypatch):
    """On a GPU the average that moves is a copy, and the one in host memory has to follow it."""
    chunk, teacher = make(topology, offload=True)
    masters = masters_of(chunk)
    walk(masters, torch.Generator().manual_seed(1))
    before = {p: average.clone() for p, average in teacher.averages.items()}
    shard = give(chunk, masters)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone())
    teacher.update(shard, 0.5)
    for parameter, average in teacher.averages.items():
        wanted = 0.5 * before[parameter] + 0.5 * shard(parameter, 0, parameter.numel())
        torch.testing.assert_close(average, wanted)


def test_covers_the_way_to_a_student_that_stands_still(topology):
    """1,000 moves at momentum 0.996 cover 98.2 % of the way; a bf16 average would have covered 1.3 %."""
    chunk, teacher = make(topology, torch.bfloat16)
    start = masters_of(chunk)
    goal = {name: master + 0.01 for name, master in start.items()}
    pairs = give(chunk, goal)
    for _ in range(1000):
        teacher.update(pairs, 0.996)
    for name, parameter in chunk.named_parameters():
        if name in averaged(chunk):
            covered = (teacher.averages[parameter] - start[name].view(-1)) / (goal[name] - start[name]).view(
                -1
            )
            assert covered.mean().item() == pytest.approx(1 - 0.996**1000, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_are_swapped_in_and_restored(topology, dtype):
    chunk, teacher = make(topology, dtype)
    x = torch.randn(3, WIDTH, dtype=dtype)
    original = chunk(x).detach()
    masters = masters_of(chunk)
    pairs = give(chunk, {name: master + 0.5 for name, master in masters.items()})
    storage = {name: parameter.data_ptr() for name, parameter in chunk.named_parameters()}
    student = chunk(x)
    assert not torch.equal(student, original)
    with teacher.weights():
        inside = chunk(x)
        assert torch.equal(inside, original)  # has not moved yet
        assert not inside.requires_grad
        assert chunk.vision_head.weight.dtype == dtype
        # Encoder, connector and mask token have no average: teacher and student share them.
        assert chunk.connector.weight.data_ptr() == storage["connector.weight"]
    assert {name: parameter.data_ptr() for name, parameter in chunk.named_parameters()} == storage
    assert torch.equal(chunk(x), student)
    assert chunk(x).requires_grad
    teacher.update(pairs, 0.0)
    with teacher.weights():
        torch.testing.assert_close(chunk(x), student)


def test_weights_are_restored_after_an_error(topology):
    chunk, teacher = make(topology)
    give(chunk, {name: master + 1 for name, master in masters_of(chunk).items()})
    before = masters_of(chunk)
    with pytest.raises(ZeroDivisionError), teacher.weights():
        1 / 0  # noqa: B018
    assert all(torch.equal(parameter, before[name]) for name, parameter in chunk.named_parameters())


@pytest.mark.parametrize("change", ["moves", "is_loaded"])
def test_codes_in_fp8_are_the_teachers_and_made_anew_when_it_changes(topology, change):
    torch.manual_seed(0)
    chunk = Chunk(torch.float32)
    chunk.fp8 = Fp8Pass()
    teacher = teacher_of(chunk, topology)
    start = chunk.vision_head.weight.detach().clone()
    pairs = give(chunk, {name: master * 3 for name, master in masters_of(chunk).items()})
    weight, rows = chunk.vision_head.weight, torch.randn(2, WIDTH)

    def taught() -> torch.Tensor:
        assert not chunk.fp8.running
        with teacher.weights():
            assert chunk.fp8.running
            return chunk.fp8.linear(rows, weight, None)

    def expected(weight: torch.Tensor) -> torch.Tensor:
        """The product of what both operands' codes stand for, in fp64."""
        return (decoded(rows) @ decoded(weight).t()).float()

    without_codes = teacher.num_bytes
    before = taught()
    assert torch.equal(taught(), before)
    assert teacher.num_bytes == without_codes + WIDTH**2 + 4 * WIDTH  # a byte a number, a scale a row
    # fp32 sums of eight products of about 0.1 each.
    torch.testing.assert_close(before, expected(start), rtol=0, atol=1e-6)
    if change == "moves":
        teacher.update(pairs, 0.0)
    else:
        teacher.load({p: p.detach().clone() for p in teacher.parameters})
    torch.testing.assert_close(taught(), expected(3 * start), rtol=0, atol=1e-6)
    assert not torch.equal(taught(), before)


def test_bf16_computes_with_rounded_averages(topology):
    chunk, teacher = make(topology, torch.bfloat16)
    masters = masters_of(chunk)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        walk(masters, generator)
        teacher.update(give(chunk, masters), 0.99)
    rounded = {p: average.bfloat16() for p, average in teacher.averages.items()}
    assert any(not torch.equal(rounded[p].float(), average) for p, average in teacher.averages.items())
    with teacher.weights():
        assert all(torch.equal(p.data.view(-1), rounded[p]) for p in rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_averages_are_loaded_and_computed_with(topology, dtype):
    chunk, teacher = make(topology, dtype)
    teacher.update(give(chunk, {name: master + 0.3 for name, master in masters_of(chunk).items()}), 0.5)
    saved = teacher.whole_averages(set(teacher.parameters))
    assert [tuple(whole.shape) for whole in saved.values()] == [tuple(p.shape) for p in saved]
    resumed = teacher_of(chunk, topology)
    resumed.load({p: whole.clone() for p, whole in saved.items()})
    x = torch.randn(3, WIDTH, dtype=dtype)
    with teacher.weights():
        wanted = chunk(x)
    with resumed.weights():
        assert torch.equal(chunk(x), wanted)
    for parameter, average in resumed.averages.items():
        assert torch.equal(average, teacher.averages[parameter])


def test_a_frozen_parameter_is_its_own_average(topology):
    """It costs no memory, computes with the student's weight, and is saved all the same."""
    torch.manual_seed(0)
    chunk = Chunk(torch.bfloat16)
    chunk.language_model.requires_grad_(requires_grad=False)
    teacher = teacher_of(chunk, topology)
    assert teacher.num_bytes == WIDTH**2 * (4 + 2)
    frozen = chunk.decoder.layers[0].weight
    with teacher.weights():
        assert frozen.data_ptr() == chunk.decoder.layers[0].weight.data_ptr()
    assert torch.equal(teacher.whole_averages({frozen})[frozen], frozen.float())


def test_a_copied_parameter_counts_once(topology):
    """With tied embeddings the last stage's copy is averaged as well, but its move is the first stage's."""
    chunk, _ = make(topology)
    chunk.language_model.output_layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    teacher = teacher_of(chunk, topology)
    pairs = give(chunk, {name: master + 1.0 for name, master in masters_of(chunk).items()})
    owned = sum(p.numel() for name, p in chunk.named_parameters() if name in averaged(chunk)) - WIDTH**2
    assert teacher.update(pairs, 0.5).item() == pytest.approx(0.5 * owned**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("pattern", "trains"),
    [("language_model", True), ("vision_head", True), ("connector", False), ("mask_token", False)],
)
def test_trains_if_anything_it_averages_does(topology, pattern, trains):
    chunk, _ = make(topology)
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(name.startswith(pattern))
    assert teacher_of(chunk, topology).trains == trains


# Momentum, whether the student changed, distance moved -> whether the run stops.
STANDSTILLS = {
    "stood_still": (0.95, True, 0.0, True),
    "stood_still_at_any_lower_momentum": (0.0, True, 0.0, True),
    "moved_a_little": (0.95, True, 1e-12, False),
    "student_stood_still_too": (0.95, False, 0.0, False),
    "momentum_has_reached_one": (1.0, True, 0.0, False),
    "just_below_what_rounding_hides": (1 - MIN_EXPECTED_MOVE / 2, True, 0.0, False),
    "just_above_what_rounding_hides": (1 - MIN_EXPECTED_MOVE * 2, True, 0.0, True),
}


@pytest.mark.parametrize(
    ("momentum", "student_moved", "distance", "stops"), STANDSTILLS.values(), ids=STANDSTILLS
)
def test_standstill(momentum, student_moved, distance, stops):
    if not stops:
        check_teacher_moved(42, distance, momentum, student_moved)
        return
    with pytest.raises(TeacherError, match="iteration 42: the teacher did not move"):
        check_teacher_moved(42, distance, momentum, student_moved)


def test_a_teacher_that_averages_nothing_is_caught(topology):
    """The fault of averaging empty shards, as under ZeRO-3: nothing of any parameter is found here."""
    chunk, _ = make(topology)
    nobody = [Bucket(places={}, numel=0, group=None)]
    teacher = Teacher([chunk], topology, nobody, "reference", averaged=AVERAGED)
    distance = teacher.update(give(chunk, masters_of(chunk)), 0.9)
    with pytest.raises(TeacherError):
        check_teacher_moved(1, distance.item(), 0.9, student_moved=True)
