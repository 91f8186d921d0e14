"""The networks: how they are created, changed and given their weights."""
