import sys, collections, subprocess, tempfile, re, os
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
import triton
from moecache.kernels.sort import SORT, _triton_sources
from moecache.schemas.problem import Problem
from moecache.schemas.config import config


def look(E, K, T, bm, cfg):
    p = Problem(
        op="moe_sort",
        vendor="nvidia",
        arch="sm_90",
        units=132,
        tokens=T,
        experts=E,
        topk=K,
        dtype="int32",
        dims={"block_m": bm},
    )
    for s in _triton_sources(p, cfg):
        attrs = {(s.fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in s.aligned}
        k = triton.compile(
            ASTSource(s.fn, s.signature, s.constexprs, attrs), target=GPUTarget("cuda", 90, 32), options=dict(s.options)
        )
        open("/tmp/k.cubin", "wb").write(k.asm["cubin"])
        d = os.path.dirname(triton.__file__) + "/backends/nvidia/bin/cuobjdump"
        out = subprocess.run([d, "--dump-sass", "/tmp/k.cubin"], capture_output=True, text=True).stdout
        ops = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", out, re.M)
        c = collections.Counter(o.split(".")[0] for o in ops)
        print(s.fn.__name__, cfg.name, "shared", k.metadata.shared, "n", len(ops), c.most_common(22))
        open(f"/tmp/{s.fn.__name__}.sass", "w").write(out)
        open(f"/tmp/{s.fn.__name__}.ttgir", "w").write(k.asm["ttgir"])


pdl = {"launch_pdl": 1}
look(512, 10, 1, 16, config("oneshot", pdl, programs=16, step=16, num_warps=4))
look(128, 8, 1, 16, config("oneshot", pdl, programs=16, step=16, num_warps=4))
look(512, 10, 16384, 64, config("multiphase", pdl, chunks=1024, block=128, step=128, scan=1, fused=0, num_warps=4))
look(128, 8, 16384, 64, config("multiphase", pdl, chunks=1024, block=128, step=128, scan=1, fused=0, num_warps=4))
