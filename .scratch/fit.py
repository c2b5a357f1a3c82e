import json, re, sys, glob
from moecache.kernels import sort as S
from moecache.kernels.sort import SORT
from moecache.schemas.problem import Problem
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN

D = KNOWN["h200"]


def parse(n):
    v, inner = n[:-1].split("(")
    kv = dict(x.split("=") for x in inner.split(","))
    kv = {k: int(x) for k, x in kv.items()}
    ex = {"launch_pdl": 1} if kv.pop("launch_pdl", 0) else {}
    return config(v, ex, **kv)


rows = json.load(open("/work/.device/6/explore.json"))
tot = []
rat = []
for r in rows:
    E, K, T = r["E"], r["K"], r["T"]
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
    L = [(t, SORT.cost(p, parse(n), D), n) for t, n in r["res"] if not SORT.fits(p, parse(n), D)]
    best = min(L)
    ch = min(L, key=lambda x: x[1])
    tot.append(ch[0] / best[0] - 1)
    rat.append(ch[1] / ch[0])
    print(
        E,
        T,
        f"best {best[0]:.2f} pred {best[1]:.2f} {best[2][:60]} | chosen {ch[0]:.2f} pred {ch[1]:.2f} {ch[2][:60]} regret {100 * tot[-1]:.0f}%",
    )
print("mean regret", sum(tot) / len(tot), "max", max(tot))
