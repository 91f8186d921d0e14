"""Computes one update: its passes, compilation, precision, memory and cost."""
