"""One method a file: its loss as a pure function, and the function that builds its objective."""
