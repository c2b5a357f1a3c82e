"""What researches choices and does not serve them: grids of timings replayed, RaMP's form, buckets compared.

Serving never imports this; `benchmarks/regret.py` and `benchmarks/learned.py` do.
"""
