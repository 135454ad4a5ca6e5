"""The operations, a file each: formulas, references in torch, kernels, launchers, the function.

This package re-exports nothing. `kernels.linear` is the function, `kernels.ops.linear` the module
that defines it, and no name stands for both.
"""
