import os, sys, time, json, itertools, multiprocessing as mp, statistics, traceback
import torch
from moecache.kernels.sort import SORT, call_args, _triton_space
from moecache.kernels.op import poison
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN
from moecache.routing import draw

DEV = KNOWN["h200"]


def cells():
    for E, K, Ts in [
        (512, 10, [1, 16, 64, 128, 256, 512, 1024, 2048, 16384]),
        (256, 8, [1, 32, 128, 256, 1024, 16384]),
        (128, 8, [64, 128, 256, 1024, 16384]),
        (8, 2, [512, 1024, 2048, 4096]),
    ]:
        for T in Ts:
            yield E, K, T


def cfgs(E, K, T):
    from moecache.schemas.problem import Problem

    p = Problem(
        op="moe_sort",
        vendor="nvidia",
        arch="sm_90",
        units=132,
        tokens=T,
        experts=E,
        topk=K,
        dtype="int32",
        dims={"block_m": 64 if T >= 256 else 16},
    )
    out = [c for c in _triton_space(p, DEV) if not SORT.fits(p, c, DEV)]
    n = T * K
    out = [
        c
        for c in out
        if not (c.variant == "multiphase" and n < 256)
        and not (c.variant == "multiphase" and c["fused"] and c["num_warps"] == 8)
    ]
    return out


def args_for(E, K, T, seed):
    return call_args(draw("uniform" if seed % 2 else "zipf", T, E, K, seed).cuda(), E, 64 if T >= 256 else 16)


def warm(part):
    res = []
    for (E, K, T), c in part:
        try:
            a = args_for(E, K, T, 3)
            want = SORT.reference(a)
            bad = 0
            for _ in range(1):
                got = SORT.launch(c, a, poison(SORT.outputs(a)))
                torch.cuda.synchronize()
                if SORT.error(got, want):
                    bad = 1
            res.append(((E, K, T), c.name, "wrong" if bad else "ok"))
        except Exception as e:
            res.append(((E, K, T), c.name, f"{type(e).__name__}: {str(e)[:150]}"))
    return res


def graph_time(fns, reps=15):
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        for f in fns[:2]:
            f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for f in fns:
            f()
    for _ in range(3):
        g.replay()
    ts = []
    for _ in range(reps):
        a = torch.cuda.Event(enable_timing=True)
        b = torch.cuda.Event(enable_timing=True)
        a.record()
        g.replay()
        b.record()
        torch.cuda.synchronize()
        ts.append(a.elapsed_time(b) * 1e3 / len(fns))
    return statistics.median(ts)


if __name__ == "__main__":
    t0 = time.time()
    work = [(c, k) for c in cells() for k in cfgs(*c)]
    print("configs", len(work), flush=True)
    ctx = mp.get_context("spawn")
    W = 16
    status = {}
    with ctx.Pool(W) as pool:
        for r in pool.imap_unordered(warm, [work[i :: W * 4] for i in range(W * 4)]):
            for cell, name, st in r:
                status[cell, name] = st
    print("prewarm", time.time() - t0, flush=True)
    from collections import Counter

    print(Counter(s if s in ("ok", "wrong") else s[:60] for s in status.values()))
    for (c, n), s in list(status.items()):
        if s != "ok":
            print("BAD", c, n, s[:80])
    ops = None
    try:
        torch.ops.load_library("run/_moe_C.abi3.so")
        ops = torch.ops._moe_C
    except Exception as e:
        print("no vllm", e)
    rows = []
    for E, K, T in cells():
        argset = [args_for(E, K, T, s) for s in range(20)]
        bm = argset[0]["block_m"]
        v = None
        if ops is not None:

            def mk(a):
                ids = a["topk_ids"]
                n = ids.numel()
                mx = min(n + E * (bm - 1), n * bm) if n < E else n + E * (bm - 1)
                s = torch.empty(mx, dtype=torch.int32, device="cuda")
                e = torch.empty((mx + bm - 1) // bm, dtype=torch.int32, device="cuda")
                p = torch.empty(1, dtype=torch.int32, device="cuda")
                return lambda: ops.moe_align_block_size(ids, E, bm, s, e, p, None)

            v = graph_time([mk(a) for a in argset])
        res = []
        for k in cfgs(E, K, T):
            if status.get(((E, K, T), k.name)) != "ok":
                continue
            try:
                outs = [SORT.outputs(a) for a in argset]
                res.append((graph_time([lambda a=a, o=o: SORT.launch(k, a, o) for a, o in zip(argset, outs)]), k.name))
            except Exception as e:
                print("FAIL", k.name, str(e)[:200])
        res.sort()
        kinds = {
            "one-pdl": lambda n: n.startswith("one") and "pdl" in n,
            "one": lambda n: n.startswith("one") and "pdl" not in n,
            "two-pdl": lambda n: "scan=0" in n and "fused=0" in n and "pdl" in n,
            "two": lambda n: "scan=0" in n and "fused=0" in n and "pdl" not in n,
            "fused": lambda n: "fused=1" in n,
            "scan-pdl": lambda n: "scan=1" in n,
        }
        f = lambda L: "; ".join(
            f"{t:.2f} {n.split('(')[1][:-1].replace('launch_pdl=1', '').replace('num_warps', 'w').replace('programs', 'P').replace('fused=0', '').replace('scan=0', '').replace('scan=1', '')}"
            for t, n in L
        )
        print(f"E{E} K{K} T{T} vllm {v:.2f}")
        for kk, fn in kinds.items():
            L = [r for r in res if fn(r[1])][:3]
            if L:
                print("   ", kk, f(L), flush=True)
        rows.append(dict(E=E, K=K, T=T, vllm=v, res=res))
    json.dump(rows, open(os.environ.get("OUT", ".") + "/explore.json", "w"))
    print("total", time.time() - t0)
