"""Speed of the data loaders."""
