"""Attention in C++ for x86-64 CPUs, and if asked for Arm's.

`build.py` compiles `csrc/`, `binding.py` calls the compiled functions, and `operators.py` makes PyTorch operators of
them.
"""
