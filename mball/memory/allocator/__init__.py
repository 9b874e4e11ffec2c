"""Segments for PyTorch's caching allocator, made of pages like an arena's: a C library and its Python side.

See [Note: pages] and those after it in `segments.c`. It has not run on a GPU yet; `wrap(allocator="mball")` uses it.
"""
