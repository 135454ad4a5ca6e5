"""The operations, one file each: formulas, references in torch, kernels, launchers, the function.

This package re-exports nothing. `kernels.linear` is the function. `kernels.ops.linear` is the
module that defines it. No name stands for both.
"""
