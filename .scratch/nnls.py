import sys

sys.path.insert(0, "/tmp/sp")
sys.path.insert(0, ".scratch")
import json, numpy as np, math
from scipy.optimize import nnls
from fit import parse

D = dict(units=132, clock=1980.0)


def feats(E, K, T, c):
    p2 = lambda n: 1 << max(0, n - 1).bit_length()
    pairs = p2(max(16, T * K))
    EB = max(32, p2(E))
    w = c["num_warps"]
    bins = EB / 32
    step = c["step"]
    us = 1 / (4 * D["clock"])  # µs per warp instruction on 4 schedulers

    def hist(B, w):  # instr, atoms
        if B * EB <= 8192:
            return B * EB / 32 * 2 * us, 0
        return max(B / 32, w) * (8 + 2.5 * bins) * us, bins * w / D["clock"]

    if c.variant == "oneshot":
        P = c["programs"]
        r = math.ceil(P / 132)
        i, a = hist(pairs, w)
        return [
            1,
            1,
            r * pairs * step / 32 * us,
            r * i,
            r * a,
            0,
            0,
            0,
            0,
            r * EB * p2(64 if T >= 256 else 16) / P / 32 * us,
        ]
    ch = c["chunks"]
    r = max(1, ch / 132)
    own = max(step, pairs / ch)
    B = c["block"]
    cw = 1 if E > 128 and B <= 256 else w
    i, a = hist(min(B, own), cw)
    n = max(1, own / B)
    i2, a2 = hist(step, w) if own > step else (0, 0)
    n2 = own / step - 1
    ph = 1 if c["fused"] else 3 if c["scan"] else 2
    return [
        ph,
        1,
        r * own * step / 32 * us,
        r * (i * n + i2 * n2),
        r * (a * n + a2 * n2),
        (0 if c["scan"] else max(r, 1) * ch * EB / 32 * us),
        own / step - 1 + n - 1,
        ch * EB * 1e-6 * (1 if c["scan"] else 0.5),
        c["fused"],
        0,
    ]


X = []
y = []
meta = []
for k in (3, 6):
    for r in json.load(open(f"/work/.device/{k}/explore.json")):
        for t, n in r["res"]:
            try:
                c = parse(n)
            except Exception:
                continue
            if c.variant == "oneshot" and k == 3:
                continue
            X.append(feats(r["E"], r["K"], r["T"], c))
            y.append(t)
            meta.append((k, r["E"], r["T"], n))
X = np.array(X)
y = np.array(y)
w = 1 / y
coef, res = nnls(X * w[:, None], np.ones(len(y)))
print(np.round(coef, 3), "rms rel", res / math.sqrt(len(y)))
from collections import defaultdict

g = defaultdict(list)
for m, t, p in zip(meta, y, X @ coef):
    g[m[:3]].append((t, p, m[3]))
R = []
for k, L in sorted(g.items()):
    b = min(L)
    ch = min(L, key=lambda x: x[1])
    R.append(ch[0] / b[0] - 1)
    print(k, f"best {b[0]:.2f} p{b[1]:.2f} {b[2][:58]} | {ch[0]:.2f} p{ch[1]:.2f} {ch[2][:58]} {100 * R[-1]:.0f}%")
print(np.mean(R), max(R))
