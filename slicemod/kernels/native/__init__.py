"""Attention in C++ for x86-64 CPUs.

`build.py` compiles `csrc/`, `binding.py` calls it, and `operators.py` offers it to PyTorch.
"""
