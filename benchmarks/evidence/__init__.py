"""Accuracy under attack, and proofs that the programs do what they promise."""
