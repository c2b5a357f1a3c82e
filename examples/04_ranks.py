"""Several ranks that must serve the same configs: one measures, all read the same file, then they compare.

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

MODEL = model_of(16, 2, 64, 32)
TOKENS = (1, 16)


def serve() -> None:
    dist.init_process_group("gloo")  # of the CPUs: what is compared is a few bytes
    rank = dist.get_rank()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    # 1. One rank of each machine measures: its file is what the others read.
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        moecache.warmup(MODEL, tokens=TOKENS, routing=["uniform"], ops=["moe_sort"], budget="20s")
    dist.barrier()

    # 2. All read it, and nobody measures any more: whether a call hits or misses is one rank's own affair.
    with moecache.using(mode="replay"):
        mine = dispatcher().digest(["moe_sort"])
        all_of_them: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(all_of_them, mine)
        if len(set(all_of_them)) > 1:
            sys.exit(f"rank {rank} would be served other configs: {all_of_them}")
        ids = torch.stack([torch.randperm(16)[:2] for _ in range(16)]).to(torch.int32)
        result = moecache.moe_sort(ids.to("cuda" if torch.cuda.is_available() else "cpu"), 16, 16)
        print(f"rank {rank} of {len(all_of_them)}: snapshot {mine[:12]}, {int(result.counts.sum())} pairs sorted")
    dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ:
        return serve()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
