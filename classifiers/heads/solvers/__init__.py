"""Numerical solvers for heads: optimisation, decomposition and sums over rows."""
