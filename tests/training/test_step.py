"""What an optimiser step costs besides its products: one wait for the device, and memory for what trains alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.conftest import settings
from tests.training.micro import CAPTION, CHANNELS, Empty, objective_of, random_batch
from wav.errors import TrainingError
from wav.model import build_model
from wav.model.layers import Blocks
from wav.model.rope import token_rope
from wav.training.draws import Roles, SeededRandom
from wav.training.ema import Ema
from wav.training.engine import init_engine, init_world, plan_batch
from wav.training.graphs import PassGraphs, can_capture
from wav.training.objectives.base import Objective
from wav.training.optimizer import build_optimizer
from wav.training.step import Done, update

pytestmark = pytest.mark.integration

MODEL = {"heads": 4, "head_dim": 48}
STATE = 16  #: bytes for a trained parameter: two moments, an average, and a gradient or a master copy; in float32


class Waits(TorchDispatchMode):
    """Counts how often a number is taken out of a tensor, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def living() -> int:
    """Bytes of all storages that tensors of this process name."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    real = [tensor for tensor in tensors if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)]
    storages = [tensor.untyped_storage() for tensor in real]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


Probe = Callable[[Objective, Callable[[int], Done], int], Any]


def trained(stage: str, probe: Probe, graphs: bool = False, **changes: Any) -> Any:
    """What ``probe`` finds in a process of its own, whose passes are recorded with ``graphs``.

    It is given the objective, a function that takes a training step, and the bytes of all tensors before there was a
    model.
    """

    def child(sender: Any) -> None:
        torch.set_num_threads(1)
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        config, world, before = settings(model=MODEL), init_world("cpu"), living()
        model = build_model(config.model, config.data, CHANNELS, CAPTION).train()
        objective = objective_of(stage, model, **changes)
        if graphs:
            objective.graphs = PassGraphs(objective.compute, objective)
        engine = init_engine(objective, objective.settings, plan_batch(objective.settings, 1), world)
        ema = Ema(engine.module, 0.9, 0, 1)

        def step(number: int) -> Done:
            inputs = objective.draw(random_batch(), Empty(), SeededRandom(0, number), number)
            return update(engine, ema, objective.settings, number, [inputs])

        sender.send(probe(objective, step, before))

    import deepspeed  # noqa: F401  # paid once, before the children

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process: Any = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # EOFError where the child failed; it said why
    finally:
        process.join(60)


def waits(objective: Objective, step: Callable[[int], Done], before: int) -> int:
    """Waits of the third step; ZeRO-3 looks at what is called in the first two."""
    step(1)
    step(2)
    with Waits() as mode:
        step(3)
    return mode.count


def bytes_beside(objective: Objective, step: Callable[[int], Done], before: int) -> float:
    """Bytes for a frozen parameter beside its weight: what neither weights nor trained parameters account for."""
    step(1)
    step(2)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in objective.parameters()]
    trains, frozen = (sum(count for count, _, learns in sizes if learns is on) for on in (True, False))
    assert frozen > 4 * trains
    weights = sum(count * size for count, size, _ in sizes)
    return (living() - before - weights - STATE * trains) / frozen


def result(objective: Objective, step: Callable[[int], Done], before: int) -> tuple[list[float], Any]:
    """Gradient norms of three steps, and the weights after them."""
    norms = [float(step(number).norm or 0.0) for number in (1, 2, 3)]
    return norms, torch.cat([p.detach().float().flatten() for p in objective.parameters() if p.requires_grad]).numpy()


LAYOUTS = [
    pytest.param(0, "fp32", id="zero 0, fp32"),
    pytest.param(2, "bf16", id="zero 2, bf16"),
    pytest.param(1, "bf16", id="zero 1, bf16", marks=pytest.mark.long),
    pytest.param(2, "fp32", id="zero 2, fp32", marks=pytest.mark.long),
    pytest.param(3, "bf16", id="zero 3, bf16", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("zero", "precision"), LAYOUTS)
def test_a_step_waits_once_for_the_device(zero: int, precision: str) -> None:
    """To learn whether its gradients are finite, which DeepSpeed asks twice in a row in ZeRO 1 and 2."""
    assert trained("pretrain_video", waits, zero_stage=zero, precision=precision) == (2 if zero in (1, 2) else 1)


@pytest.mark.parametrize(("zero", "precision"), LAYOUTS)
def test_frozen_parameters_cost_their_weights_alone(zero: int, precision: str) -> None:
    """The value stage: no gradient, moments, average or float32 copy of the video expert; a copy would be 2 bytes."""
    assert trained("train_value", bytes_beside, zero_stage=zero, precision=precision) < 1


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_an_exchange_with_no_other_rank_is_left_out_without_a_trace(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"zero_stage": zero, "precision": "fp32", "clip": 1e-2}  # so that the norm decides
    stage = "pretrain_video"
    if zero == 0:  # the optimiser sees what no sample reached as well, and lets it decay
        stage, changes = "train_joint", changes | {"action_probability": 1.0, "weight_decay": 0.5}
    norms, weights = trained(stage, result, **changes)
    monkeypatch.setattr("wav.training.engine.leave_out_exchange", lambda optimizer: None)
    monkeypatch.setattr("wav.training.engine.leave_out_copies", lambda engine: None)
    wanted_norms, wanted = trained(stage, result, **changes)
    assert min(wanted_norms) > 2e-2
    assert norms == pytest.approx(wanted_norms, rel=1e-5)
    assert abs(weights - wanted).max() < (1e-6 if zero else 1e-12)


def computed_anew(
    call: Callable[[], Any], device: torch.device, pool: Any, tight: bool = False
) -> tuple[Callable[[], None], Any]:
    """In the place of a CUDA graph: a replay calls again, and writes into the results of the first call."""
    result = call()

    def replay() -> None:
        (loss, parts, gradients), (new_loss, new_parts, new_gradients) = result, call()
        for kept, new in zip(
            [loss, *parts.values(), *gradients], [new_loss, *new_parts.values(), *new_gradients], strict=True
        ):
            if kept is not None:
                kept.copy_(new)

    return replay, result


@contextmanager
def themselves(graphs: PassGraphs) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """In the place of stand-ins: what is computed anew reads the module as it is then."""
    yield {parameter: parameter for parameter in graphs._module.parameters()}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes are recorded as far as a CPU can; for each, how many tables of tokens' positions it left in the pool."""
    tables: list[int] = []

    def watched(call: Callable[[], Any], *where: Any, tight: bool = False) -> tuple[Callable[[], None], Any]:
        before = token_rope.cache_info().misses
        found = computed_anew(call, *where, tight)
        tables.append(token_rope.cache_info().misses - before)
        return found

    monkeypatch.setattr("wav.training.graphs.capture", watched)
    monkeypatch.setattr("torch.cuda.MemPool", lambda: None)
    monkeypatch.setattr(PassGraphs, "_stand_ins", themselves)
    return tables


RECORDED = [
    pytest.param("pretrain_video", 0, "fp32", id="video, zero 0, fp32"),  # whose gradients we clip where they lie
    pytest.param("pretrain_video", 2, "bf16", id="video, zero 2"),
    pytest.param("train_value", 2, "bf16", id="value, zero 2"),
    pytest.param("train_joint", 2, "bf16", id="joint, zero 2"),
    pytest.param("train_joint", 0, "bf16", id="joint, zero 0", marks=pytest.mark.long),
    pytest.param("train_joint", 0, "fp32", id="joint, zero 0, fp32", marks=pytest.mark.long),
    pytest.param("train_joint", 1, "bf16", id="joint, zero 1", marks=pytest.mark.long),
    pytest.param("train_joint", 1, "fp32", id="joint, zero 1, fp32", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("stage", "zero", "precision"), RECORDED)
def test_recorded_passes_train_as_others(stage: str, zero: int, precision: str, request: pytest.FixtureRequest) -> None:
    """Through the engine; the joint stage's roles change from step to step, so it records several passes."""
    changes: dict[str, Any] = {"zero_stage": zero, "precision": precision, "clip": 1e-2}
    if stage == "train_joint":
        changes["action_probability"] = 0.7
    wanted_norms, wanted = trained(stage, result, **changes)
    request.getfixturevalue("recorded")
    norms, weights = trained(stage, result, graphs=True, **changes)
    assert norms == wanted_norms
    assert (weights == wanted).all()


def joint(*roles: Roles) -> tuple[Objective, Callable[[int], Any]]:
    """The joint objective, recorded, and a pass of the given index, whose samples have these roles."""
    objective = objective_of(
        "train_joint", build_model(settings(model=MODEL).model, settings().data, CHANNELS, CAPTION).train()
    )
    objective.graphs = PassGraphs(objective.compute, objective, "train_joint.compile = auto")
    monkey: Any = objective
    monkey.roles = lambda size, index: roles[index]
    return objective, lambda n: objective(objective.draw(random_batch(), Empty(), SeededRandom(0, n), n))


def test_tables_of_a_role_that_comes_late_are_not_in_the_memory_of_graphs(recorded: list[int]) -> None:
    """There the next launch of an earlier graph would write over them."""
    token_rope.cache_clear()
    _, compute = joint(Roles(0, 0, 8), Roles(0, 4, 4), Roles(4, 0, 4), Roles(3, 1, 4), Roles(4, 0, 4))
    for index in range(5):
        compute(index)
    assert token_rope.cache_info().misses == 2  # of values and of actions
    assert recorded == [0, 0, 0, 0]


def test_a_pass_that_cannot_be_recorded_ends_the_run_in_a_sentence(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 48.00 MiB.")

    monkeypatch.setattr("wav.training.graphs.capture", short)
    objective, compute = joint(Roles(4, 2, 2))
    before = list(objective.parameters())
    with pytest.raises(TrainingError, match=r"^train_joint\.compile = auto: .*memory\. Tried .*; set compile to off"):
        compute(0)
    assert all(one is other for one, other in zip(objective.parameters(), before, strict=True))


def test_only_what_was_measured_is_recorded_unasked() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    train = settings().train_joint
    assert train.compile == "auto"
    assert can_capture(train, cuda, 1, 1)
    assert not can_capture(train, cpu, 1, 1)
    assert not can_capture(train, cuda, 1, 2)  # gradients would be accumulated
    assert not can_capture(train, cuda, 8, 1)
    assert can_capture(train.model_copy(update={"compile": "on"}), cuda, 8, 1)
    assert not can_capture(train.model_copy(update={"zero_stage": 3}), cuda, 1, 1)


def test_what_a_graph_is_captured_on_lies_in_the_memory_of_the_module() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).requires_grad_(False))
    own = list(module.parameters())
    with PassGraphs(lambda inputs: (torch.zeros(()), {}), module)._stand_ins() as others:
        held = list(module.parameters())
        assert held == [others[parameter] for parameter in own]
        assert not any(one is other for one, other in zip(held, own, strict=True))
        assert [p.data_ptr() for p in held] == [p.data_ptr() for p in own]
        assert [p.requires_grad for p in held] == [True, True, False, False]
    assert all(one is other for one, other in zip(module.parameters(), own, strict=True))


def test_zero_lays_the_weights_of_blocks_where_compiled_code_may_read_them() -> None:
    """In one flat buffer in the optimiser's order; of a model whose heads have odd sizes."""
    objective = objective_of(
        "train_joint", build_model(settings(model=MODEL).model, settings().data, CHANNELS, CAPTION)
    )
    assert any(parameter.numel() % 8 for parameter in objective.parameters())
    offsets, end = {}, 0
    for group in build_optimizer(objective, objective.settings).param_groups:
        for parameter in group["params"]:
            offsets[parameter] = end
            end += parameter.numel()
    blocks = [p for m in objective.modules() if isinstance(m, Blocks) for p in m.parameters()]
    assert blocks
    assert [offsets[parameter] % 8 for parameter in blocks] == [0] * len(blocks)
