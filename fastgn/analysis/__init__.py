"""What a run or a model shows."""
