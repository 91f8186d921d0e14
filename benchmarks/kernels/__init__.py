"""Speed and machine code of the kernels."""
