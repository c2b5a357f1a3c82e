"""What researches choices and does not serve them: grids of timings replayed, RaMP's form, layers profiled.

Serving never imports this; the command `profile`, `benchmarks/regret.py` and `benchmarks/learned.py` do.
"""
