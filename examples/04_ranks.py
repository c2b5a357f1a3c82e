"""Several ranks must serve the same configs. One rank measures, all read the same file, then they compare.

python examples/04_ranks.py          two ranks of this machine, over gloo
torchrun --nproc-per-node 8 examples/04_ranks.py
"""

import os
import sys

import torch
import torch.distributed as dist

import moecache
from moecache.dispatch import dispatcher
from moecache.models import model_of
from moecache.team import Team

MODEL = model_of(16, 2, 64, 32)
TOKENS = (1, 16)


def serve() -> None:
    dist.init_process_group("gloo")
    team = Team.of(timeout=120)  # seconds; longer than the warm-up, as the others wait for it
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with team.staying():  # if a rank fails here, the others do not wait for it
        agreed(team)
    dist.destroy_process_group()


def agreed(team: Team) -> None:
    # 1. One rank of each machine measures. The others read its file.
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        moecache.warmup(MODEL, tokens=TOKENS, routing=["uniform"], ops=["moe_sort"], budget="20s")
    team.barrier("warm-up")

    # 2. All read the file, and nobody measures any more. A call exchanges nothing, whether it hits or misses.
    with moecache.using(mode="replay"):
        digest = team.same(dispatcher().digest(["moe_sort"]))  # raises if a rank would be served other configs
        ids = torch.stack([torch.randperm(16)[:2] for _ in range(16)]).to(torch.int32)
        result = moecache.moe_sort(ids.to("cuda" if torch.cuda.is_available() else "cpu"), 16, 16)
        print(f"rank {team.rank} of {team.size}: digest {digest[:12]}, {int(result.counts.sum())} pairs sorted")


def main() -> None:
    if "RANK" in os.environ:
        return serve()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
