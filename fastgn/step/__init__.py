"""How one update is computed: its passes, compilation, precision, memory and cost."""
