"""DeepSpeed: process group and engine.

On a CPU nothing is compiled: the shared-memory collective's C++ extension is switched off and the
optimisers are torch's own. Ranks of one machine need no port that other machines can reach.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore, HashStore

from wav.errors import ConfigError
from wav.training import RENDEZVOUS
from wav.training.optimizer import build_optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from wav.config import TrainSettings

_NEVER = 2**31 - 1
#: Elements of a gradient bucket, DeepSpeed's own default; it has that size however few parameters are trained.
BUCKET = 500_000_000
T = TypeVar("T")


class Fetched:
    """Numbers of a device tensor on their way to the host.

    Reading them waits until they have arrived, and for nothing that was launched after them.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._host = values.to("cpu", non_blocking=True)  # into page-locked memory
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def numbers(self) -> list[float]:
        """The numbers of a vector."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Rank 0's object on every rank."""
        if self.ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def ask_most(self, number: int) -> Fetched:
        """The largest of the ranks' numbers (a collective), on its way: nobody waits before it is read."""
        box = torch.full((1,), number, dtype=torch.int64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return Fetched(box)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers (a collective)."""
        return int(self.ask_most(number).numbers()[0])

    def mean(self, values: list[float]) -> list[float]:
        """Element-wise mean over the ranks (a collective)."""
        if self.ranks == 1 or not values:
            return values
        box = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(box)
        return (box / self.ranks).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BatchPlan:
    """How one optimiser step's global batch is cut: ``micro`` samples x ``accumulation`` passes x ranks."""

    micro: int
    accumulation: int


def plan_batch(settings: TrainSettings, ranks: int) -> BatchPlan:
    """Cut ``settings.batch_size`` over the ranks; ConfigError when it does not divide."""
    if settings.batch_size % ranks:
        raise ConfigError(f"batch_size = {settings.batch_size}: must be a multiple of the {ranks} ranks")
    micro = settings.micro_batch_size or settings.batch_size // ranks
    if settings.batch_size % (micro * ranks):
        raise ConfigError(
            f"micro_batch_size = {micro}: batch_size {settings.batch_size} must be a multiple of "
            f"micro_batch_size x {ranks} ranks"
        )
    return BatchPlan(micro, settings.batch_size // (micro * ranks))


def resolve_device(name: str, local_rank: int) -> torch.device:
    """``auto`` is CUDA where there is one; ConfigError for a device this machine has not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"WAV_DEVICE = {name!r}: this machine has no CUDA device; use cpu or auto")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def adopt_launcher() -> None:
    """Fill in RANK, WORLD_SIZE and LOCAL_RANK from SLURM's names where only ``srun`` started this rank.

    torchrun and DeepSpeed's launcher set them, and where the ranks meet, themselves. ConfigError where nothing says
    which rank this is, or where several meet.
    """
    slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for name, other in slurm.items():
        if name not in os.environ and other in os.environ:
            os.environ[name] = os.environ[other]
        if not os.environ.get(name, "").isdigit():
            raise ConfigError(
                f"{name} = {os.environ.get(name, '')!r}: must be a number; start a rank through a stage, torchrun, "
                "deepspeed or srun"
            )
    if int(os.environ["WORLD_SIZE"]) > 1 and not os.environ.get(RENDEZVOUS):
        if not os.environ.get("MASTER_ADDR"):
            raise ConfigError("MASTER_ADDR is not set; export it as the first node's name, for all ranks alike")
        os.environ.setdefault("MASTER_PORT", "29500")


def init_world(device_name: str) -> World:
    """Join the process group described by RANK, WORLD_SIZE and LOCAL_RANK.

    A single process meets itself in memory, the ranks of one machine through a file (:mod:`.launch`): neither opens a
    port that another program could hold or talk to. Several nodes meet at MASTER_ADDR and MASTER_PORT.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = resolve_device(device_name, int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        path = os.environ.get(RENDEZVOUS)
        if ranks == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        elif path:
            dist.init_process_group(backend, store=FileStore(path, ranks), rank=rank, world_size=ranks)
        else:
            dist.init_process_group(backend)
    return World(rank, ranks, device)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send what this process and its children write to the standard error stream nowhere."""
    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def clips_here(settings: TrainSettings) -> bool:
    """Whether :mod:`.step` clips, which needs the norm anyway; elsewhere DeepSpeed does, where it holds gradients."""
    return settings.zero_stage == 0 and settings.precision == "fp32"


def deepspeed_config(settings: TrainSettings, plan: BatchPlan, device_type: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a run (``infra/deepspeed/`` holds those of the paper's size)."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    alone = settings.batch_size == plan.micro * plan.accumulation  # one rank reduces nothing
    if device_type == "cpu" or alone:
        zero["overlap_comm"] = False
    if alone:
        zero["contiguous_gradients"] = False
    return {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0 if clips_here(settings) else settings.clip,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
    }


def init_engine(
    module: nn.Module, settings: TrainSettings, plan: BatchPlan, world: World, universal: bool = False
) -> DeepSpeedEngine:
    """Wrap ``module`` for training: an optimiser of what requires a gradient, ZeRO, clipping, precision from settings.

    ``universal``: the checkpoint that will be loaded is in DeepSpeed's universal layout (:mod:`.universal`).
    """
    with quiet_stderr():  # its import probes for libaio with the linker, which complains aloud
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build needs a compiler and 85 s
    optimizer = build_optimizer(module, settings)
    config = deepspeed_config(settings, plan, world.device.type)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    config["zero_optimization"]["reduce_bucket_size"] = min(BUCKET, trained)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine: DeepSpeedEngine
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if settings.zero_stage == 3:
        clear_padding(engine, world)
    if hasattr(engine.optimizer, "check_overflow"):
        engine.optimizer.check_overflow = lambda *_, **__: None  # the norm tells the same of the same gradients
    if world.ranks == 1 and settings.zero_stage in (1, 2):
        leave_out_exchange(engine.optimizer)
    elif world.ranks == 1 and clips_here(settings):
        leave_out_copies(engine)
    return engine


def leave_out_exchange(optimizer: Any) -> None:
    """Let ZeRO 1 or 2 on one rank neither copy gradients to be exchanged nor take their norm one by one, in float64.

    Measured on one card at the paper's size, both were a tenth of a step (DeepSpeed 0.19.8).
    """

    def norm(gradients: list[torch.Tensor], *_: Any) -> torch.Tensor:
        norms: Any = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        total = torch.linalg.vector_norm(torch.stack(norms))
        return torch.where(total.isfinite(), total, -torch.ones_like(total))  # as DeepSpeed marks what it drops

    optimizer.buffered_reduce_fallback = lambda *_, **__: None
    optimizer.get_grad_norm_direct = norm


def leave_out_copies(engine: Any) -> None:
    """Let ZeRO 0 in float32 on one rank not exchange gradients with itself, nor walk the modules to find them.

    Measured on a CPU with 711 trained tensors, that was 12 of the 30 ms that a step took the host (DeepSpeed 0.19.8). A
    parameter that no sample reached has a gradient of zero, as in every exchange.
    """
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def fill() -> None:
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    engine.allreduce_gradients = fill
    engine.zero_grad = engine.optimizer.zero_grad


@torch.no_grad()
def clear_padding(engine: DeepSpeedEngine, world: World) -> None:
    """Zero what ZeRO-3 leaves uninitialised behind the last elements of a partition that is not full.

    Nothing computes with those elements, but checkpoints hold them: equal runs would write unequal files, and pieces
    of this process's memory would go to the store.
    """

    def clear(place: torch.Tensor, parameter: Any) -> None:
        used = min(max(parameter.ds_numel - world.rank * place.numel(), 0), place.numel())
        place[used:].zero_()

    for parameter in engine.module.parameters():
        clear(parameter.ds_tensor, parameter)
    optimizer = engine.optimizer
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        parts = flat.split([parameter.ds_tensor.ds_numel for parameter in group])
        for part, parameter in zip(parts, group, strict=True):
            clear(part, parameter)
