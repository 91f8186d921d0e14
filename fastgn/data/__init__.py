"""Images: one Batch contract, whatever they come from (see batch.py).

Nothing is imported here, so that fastgn.data.pack and fastgn.data.check answer a mistake at once.
"""
