"""The loader that decodes and augments with NVIDIA DALI."""
