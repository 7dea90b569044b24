"""Objectives beside the null-space ratio: what a merge should reproduce of the adapters it is made of."""
