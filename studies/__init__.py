"""The paper's comparisons and ablations at a size that two CPU cores can repeat.

`python -m studies run` works through a queue of trials, `python -m studies plot` draws what is
there; `docs/results.md` reads it. A trial is a run of the product, with nothing added to it.
"""
