"""The methods, one per file, each with its loss as a pure function and a function `build`."""
