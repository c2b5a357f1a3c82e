"""`warm --ep`: the ranks of a model's layers, which measure together how they exchange tokens."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from moecache.cli import find
from moecache.schemas.errors import InvalidInput
from moecache.schemas.warm import LeftOut, Progress, WarmRow

if TYPE_CHECKING:
    import torch

    from moecache.cli.progress import Meter
    from moecache.models import Model
    from moecache.settings import Settings

EXCHANGE = "ep_exchange"  # the one op that ranks measure together
TIMEOUT = 300.0  # seconds that a rank waits for another, which may compile
GRACE = 10.0  # seconds in which ranks say why they end, once one of them has failed


def asked(model: "Model | None", ep: int, ops: Sequence[str] | None) -> bool:
    """Whether a warm-up asks how ranks exchange tokens.

    Raises:
        typer.BadParameter: it names the op, and no model or no ranks.
    """
    if EXCHANGE in (ops or ()) and (model is None or ep < 2):
        raise typer.BadParameter(f"{EXCHANGE} takes a model and --ep 2 or more", param_hint="--op")
    return model is not None and ep > 1 and (not ops or EXCHANGE in ops)


def launched(ep: int) -> bool:
    """Whether torchrun, or `start`, has made this process one of the ranks.

    Raises:
        InvalidInput: of another number of ranks.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return False
    if (size := os.environ["WORLD_SIZE"]) != str(ep):
        raise InvalidInput(f"--ep {ep}, but WORLD_SIZE={size}: start as many processes as there are ranks")
    return True


def left_out(ep: int, ray: bool = False) -> list[LeftOut]:
    """Why the ranks are not started here, unless their op is named."""
    if ray:
        return [LeftOut(EXCHANGE, "with --ray each GPU measures alone", True)]
    import torch

    gpus = torch.cuda.device_count()
    why = f"its {ep} ranks need a GPU each, and {gpus} are here; where there are none, --op {EXCHANGE} measures gloo"
    return [] if gpus >= ep else [LeftOut(EXCHANGE, why, True)]


def start(ep: int, named: bool) -> int | None:
    """Run this program once for each rank, and give the exit code; None if there are too few GPUs for that.

    Raises:
        InvalidInput: there are too few, and the op was named; or there is no Triton.
    """
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from moecache.kernels import registry

    if left := left_out(ep):
        if not named:
            return None
        if torch.cuda.device_count():
            raise InvalidInput(str(left[0]))
    registry.get(EXCHANGE)  # says once what it lacks, not once a rank
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ep)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # no rank keeps the store: this process does
    command, ranks = [sys.executable, "-m", "moecache", *sys.argv[1:]], list[subprocess.Popen[bytes]]()
    try:
        for rank in map(str, range(ep)):
            ranks.append(subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}))
        while None in (codes := [each.poll() for each in ranks]) and not any(codes):
            time.sleep(0.05)
    finally:
        for each in ranks:
            with suppress(subprocess.TimeoutExpired):
                each.wait(GRACE)
            each.terminate()
    return next((code for each in ranks if (code := each.wait())), 0)


def warmed(
    chosen: "Settings", model: "Model", meter: "Meter", asked: dict[str, Any]
) -> tuple[list[WarmRow], dict[str, Any] | None]:
    """What ranks, of which this process is one, measure together, and what is left to ask of this one; None for
    nothing."""
    find.writable(chosen).close()
    began, budget = time.monotonic(), asked["budget"]
    rows = _exchanged(chosen, model, asked["tokens"], asked["again"], budget, meter)
    if budget is not None:
        budget = max(0.0, budget - (time.monotonic() - began))
    rest = [name for name in asked["ops"] or () if name != EXCHANGE]
    return rows, asked | {"budget": budget, "ops": rest or None} if rest or not asked["ops"] else None


def _exchanged(
    settings: "Settings",
    model: "Model",
    tokens: Sequence[int],
    again: bool,
    budget: float | None,
    progress: Callable[[Progress], None],
) -> list[WarmRow]:
    """How ranks, of which this process is one, exchange the tokens of a model's layers. All of them measure together;
    those but the first then end."""
    from moecache.kernels import registry

    registry.get(EXCHANGE)  # says what it lacks, before an import does
    from moecache.dispatch import exchange, using
    from moecache.kernels.ep.context import EpContext
    from moecache.team import Team
    from moecache.warmup import warmup

    rows, began = list[WarmRow](), time.monotonic()
    with _group() as device:
        for sizes in _exchanges(model, device):
            team = Team.of(timeout=TIMEOUT)
            left = None if budget is None else max(0.0, budget - (time.monotonic() - began))
            with (
                EpContext(None, max_tokens_per_rank=max(tokens), device=device, team=team, **sizes) as ctx,
                using(settings, team=team),
                exchange.offered(ctx),
            ):
                problems = [exchange.problem(ctx, count) for count in tokens]
                tell = None if team.rank else progress
                rows += warmup(
                    problems, ops=[EXCHANGE], again=again, budget=left, device=device.index or 0, progress=tell
                )
    if team.rank:
        raise typer.Exit
    return rows


def _exchanges(model: "Model", device: "torch.device") -> list[dict[str, Any]]:
    """What a context is told of each kind of exchange that the layers have. Rows for fp8 weights may travel as fp8, but
    not by collectives alone."""
    import torch

    from moecache.kernels.matrix import DTYPES

    found = list[dict[str, Any]]()
    for layer in model.layers:
        sizes = {"hidden": layer.hidden, "num_experts": layer.global_experts, "topk": layer.topk}
        dtype = DTYPES.get(layer.dtype, torch.bfloat16)
        for wire in ("same", "fp8") if layer.dtype == "fp8" and device.type == "cuda" else ("same",):
            found += [kind] if (kind := {**sizes, "dtype": dtype, "wire": wire}) not in found else []
    return found


@contextmanager
def _stdout_to_stderr() -> "Iterator[None]":
    """Within the block: gloo of torch 2.8 says on stdout, where JSON belongs, how many ranks it is connected to."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@contextmanager
def _group() -> "Iterator[torch.device]":
    """Within the block there is a process group; gives the device of this rank."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpu:  # of which a launcher may show each rank its own alone
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if own := not dist.is_initialized():
        with _stdout_to_stderr():
            dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    yield device
    if own:
        dist.destroy_process_group()
