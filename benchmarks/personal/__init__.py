"""The pieces of the benchmark of personalised tuning (../personalization.py)."""
