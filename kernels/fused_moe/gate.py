"""The Triton kernel that lets one of two alternatives of a captured call work: the other one sees no rows."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

APART = tl.constexpr(4)  # int32 between the two totals: Triton compiles a kernel anew for an address off 16 bytes


@triton.jit(do_not_specialize=["mask"])
def gate(BUCKET, FIRST, SECOND, TOTALS, POSTED, mask, PDL: tl.constexpr):
    """TOTALS[0] = used rows of the first alternative, TOTALS[APART] of the second, 0 for the one that is not to work:
    the first where bit `bucket` of the mask is set. The bucket is the one that a sort has posted; it is passed on."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    bucket = tl.load(BUCKET)
    second = (mask >> bucket) & 1
    tl.store(TOTALS, tl.load(FIRST) * (1 - second))
    tl.store(TOTALS + APART, tl.load(SECOND) * second)
    tl.store(POSTED, bucket)
