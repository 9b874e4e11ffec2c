"""The private torch APIs that mball stands on, in one place; `probes` says which of them this torch has.

If one that capture needs is missing, `missing_for_capture` says so and `mball.wrap` runs the model through the dispatch
mode alone: the same results and the same budget, without the knowledge that a captured graph gives.

What has been there for years is used where it is needed: the kinds of operators in `torch._ops`, `torch._neg_view`, a
tensor's `_version`, a module's `_parameters` and `_modules`.

Inductor is imported by the functions that need it, when they are called: that takes seconds.
"""
