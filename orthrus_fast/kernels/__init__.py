"""The kernels of a pass: ``interface`` has the signatures, ``plain`` and ``plain_sampling`` the
PyTorch code, ``select`` the choice. The rest is Triton, imported only for a CUDA device, which must
be current. Names in ``_op`` are custom operators: torch.compile does not look inside.
"""
