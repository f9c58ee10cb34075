"""Evaluation as a job: pictures drawn or given, looked at in batches, and turned into numbers."""
