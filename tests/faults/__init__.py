"""`make chaos`: the promises about interrupted runs and bad data, kept while things go wrong.

Each scenario trains a tiny model with the real `mdm` in processes of its own, does to them what a
cluster, a disk or a data set would, and compares the rest with a run that nothing disturbed.
"""
