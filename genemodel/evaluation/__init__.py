"""Scores, baselines and reports: arrays and AnnData in, numbers and figures out."""
