"""Benchmarks of fastgn, one program per question: `python -m benchmarks.step.memory --help`.

Each program writes a record into results/, and its table(record) makes the Markdown table from it.
"""
