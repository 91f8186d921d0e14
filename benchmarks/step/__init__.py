"""What an update costs: time, memory, bytes, and the accuracy of its gradient."""
