"""Analyses of runs and trained models: attacks, checks, statistics, figures and the report."""
