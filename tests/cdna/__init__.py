"""An interpreter of gfx942 and gfx950 machine code, so that the kernels are executed where no AMD GPU is.

`library.py` builds and loads the C part, `assembly.py` reads what Triton emits, `device.py` puts an interpreted device
in place of a GPU, `cases.py` says what is run. CONTRIBUTING.md says what this proves and what it does not.
"""
