"""CUDA kernels on a machine without a GPU; README.md says how, tests/test_cudacheck.py shows it."""
