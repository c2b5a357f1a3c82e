"""Numbers that a kernel and the torch around it must agree on. Imports nothing: a process that only compiles kernels
would otherwise wait seconds for torch."""

BLOCK = 128  # rows and columns of fp8 weights, and columns of a token, that share a scale in fp8_block
FLOOR = 1e-10  # least absolute maximum of an fp8 scale: a row of zeros must not divide by zero
RING_BOX = 64  # values of a row that one load of a ring takes: 128 bytes, as wide as shared memory is swizzled
REUSE = 8  # product rows that read one row of `a` where rows are gathered: the top-k of most models
