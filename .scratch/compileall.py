import sys, collections, time, os
from concurrent.futures import ProcessPoolExecutor
from moecache.kernels.sort import SORT, _shared
from moecache.kernels.compile import compile_source, why_unfit
from moecache.schemas.problem import Problem
from moecache.schemas.device import by_arch


def one(a):
    arch, E, K, T, i = a
    d = by_arch(arch)
    p = Problem(
        op="moe_sort",
        vendor=d.vendor,
        arch=arch,
        units=d.units,
        tokens=T,
        experts=E,
        topk=K,
        dtype="int32",
        dims={"block_m": 64},
    )
    c = SORT.space(p, d)[i]
    out = []
    for s in SORT.sources(p, c, d):
        t = time.time()
        try:
            r = compile_source(s, d)
            out.append(
                (
                    s.fn.__name__,
                    r.registers,
                    r.spills,
                    r.shared_bytes,
                    _shared(p, c),
                    why_unfit(r, d),
                    round(time.time() - t, 1),
                )
            )
        except Exception as e:
            out.append((s.fn.__name__, 0, 0, 0, 0, type(e).__name__ + str(e)[:100], 0))
    return a, c.name, out


if __name__ == "__main__":
    work = []
    for arch in sys.argv[2:]:
        d = by_arch(arch)
        for E, K in [(8, 2), (128, 8), (512, 10)]:
            for T in (1, 64, 1024, 16384):
                p = Problem(
                    op="moe_sort",
                    vendor=d.vendor,
                    arch=arch,
                    units=d.units,
                    tokens=T,
                    experts=E,
                    topk=K,
                    dtype="int32",
                    dims={"block_m": 64},
                )
                n = len(SORT.space(p, d))
                work += [(arch, E, K, T, i) for i in range(0, n, int(sys.argv[1]))]
    t = time.time()
    with ProcessPoolExecutor(2) as ex:
        res = list(ex.map(one, work, chunksize=4))
    ks = [(r[0], r[1], k) for r in res for k in r[2]]
    print(
        len(work),
        "configs",
        len(ks),
        "kernels",
        time.time() - t,
        "s; max shared",
        max(k[2][3] for k in ks),
        "max time",
        max(k[2][6] for k in ks),
    )
    for r in ks:
        if r[2][5] or r[2][3] > r[2][4]:
            print(r)
