"""Networks: building them, changing their operators, and loading their weights."""
