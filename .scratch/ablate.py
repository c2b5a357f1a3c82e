import importlib.util, sys, statistics, torch, triton, re, os
from moecache.kernels import sort as S
from moecache.kernels.sort import SORT
from moecache.schemas.config import config

sys.path.insert(0, ".scratch")
from explore import args_for, graph_time

src = open("kernels/sort_triton.py").read()
one = src[src.index("def oneshot(") : src.index("def _rank(")]


def cut(text, a, b=""):
    assert a in text, a
    return text.replace(a, b)


SUMM = """    if program == PROGRAMS - 1:
        _summary(counts, TOTAL, OFFSETS, COUNTS, POSTED, n // K, E, EB, BM)
"""
PAD = one[one.index("    _pad_and_tail(") : one.index("    if program == PROGRAMS")]
PLACE = one[one.index("    if program * STEP < n:") : one.index("    _pad_and_tail(")]
HIST = "    counts = tl.histogram(tl.maximum(expert, 0), EB, mask=expert >= 0)\n"
ENDS = "    padded, end = _ends(counts, BM)\n"
V = {
    "full": one,
    "nosum": cut(one, SUMM),
    "nopad": cut(one, PAD),
    "noplace": cut(one, PLACE),
    "nohist": cut(one, HIST, "    counts = tl.load(COUNTS+tl.arange(0,EB),mask=tl.arange(0,EB)<E,other=0)*0\n"),
    "noscan": cut(one, ENDS, "    padded = counts\n    end = counts\n"),
    "onlyhist": cut(cut(cut(one, SUMM), PAD), PLACE)
    + "    tl.store(COUNTS+tl.arange(0,EB),end,mask=tl.arange(0,EB)<E)\n",
    "nosum_nopad": cut(cut(one, SUMM), PAD),
}
mods = {}
for k, v in V.items():
    i = v.rindex("\n\n\n@triton.jit") if "\n\n\n@triton.jit" in v else None
    body = src.replace(
        one,
        v if k != "onlyhist" else v.replace("\n\n\n@triton.jit\n    tl.store", "\n    tl.store") + "\n\n@triton.jit\n",
    )
    if k == "onlyhist":
        v2 = v
        j = v2.index("\n\n\n@triton.jit")
        v2 = v2[:j] + "\n    tl.store(COUNTS+tl.arange(0,EB),end,mask=tl.arange(0,EB)<E)\n\n\n@triton.jit\n"
        body = src.replace(one, v2)
    p = f"/tmp/abl_{k}.py"
    open(p, "w").write(body)
    sp = importlib.util.spec_from_file_location(f"abl_{k}", p)
    m = importlib.util.module_from_spec(sp)
    sp.loader.exec_module(m)
    mods[k] = m
import moecache.kernels as K

real = sys.modules.get("moecache.kernels.sort_triton")
for E, Kk, T, cfg in [
    (512, 10, 1, config("oneshot", {"launch_pdl": 1}, programs=16, step=16, num_warps=4)),
    (512, 10, 64, config("oneshot", {"launch_pdl": 1}, programs=64, step=16, num_warps=4)),
    (128, 8, 64, config("oneshot", {"launch_pdl": 1}, programs=64, step=16, num_warps=4)),
    (128, 8, 1, config("oneshot", {"launch_pdl": 1}, programs=16, step=16, num_warps=4)),
]:
    argset = [args_for(E, Kk, T, s) for s in range(20)]
    outs = [SORT.outputs(a) for a in argset]
    line = []
    for k, m in mods.items():
        sys.modules["moecache.kernels.sort_triton"] = m
        import moecache.kernels

        setattr(moecache.kernels, "sort_triton", m)
        try:
            line.append(
                f"{k} {graph_time([lambda a=a, o=o: SORT.launch(cfg, a, o) for a, o in zip(argset, outs)]):.2f}"
            )
        except Exception as e:
            line.append(f"{k} {type(e).__name__} {str(e)[:80]}")
    print(E, T, "; ".join(line), flush=True)
