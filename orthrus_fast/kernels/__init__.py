"""The kernels of a pass.

- ``interface``: the signatures, and ``Kernels``, one implementation of each.
- ``plain``, ``plain_sampling``: in PyTorch; ``select``: which ones a device gets.

The rest is Triton, imported only where a CUDA device is used. Names that end in ``_op`` are custom
operators, which torch.compile calls without looking inside. Kernels start on the current CUDA
device, which must be the tensors'.
"""
