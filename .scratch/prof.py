import torch, sys

sys.path.insert(0, ".scratch")
from explore import args_for
from moecache.kernels.sort import SORT
from moecache.schemas.config import config

for E, K, T, c in [
    (512, 10, 16384, config("multiphase", chunks=1024, block=256, step=256, scan=1, fused=0, num_warps=8)),
    (512, 10, 1024, config("multiphase", chunks=128, block=128, step=128, scan=1, fused=0, num_warps=4)),
    (128, 8, 16384, config("multiphase", chunks=1024, block=128, step=128, scan=1, fused=0, num_warps=4)),
    (128, 8, 1024, config("multiphase", chunks=64, block=128, step=128, scan=1, fused=0, num_warps=4)),
    (512, 10, 64, config("oneshot", programs=64, step=16, num_warps=4)),
]:
    a = args_for(E, K, T, 0)
    o = SORT.outputs(a)
    for _ in range(2):
        SORT.launch(c, a, o)
    torch.cuda.synchronize()
