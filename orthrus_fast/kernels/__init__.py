"""The kernels of a pass.

- ``interface``: the signatures, and ``Kernels``, one implementation of each.
- ``plain``, ``plain_sampling``: in PyTorch; ``select``: which ones a device gets.

The rest is Triton, imported only where a CUDA device is used:

- ``products``: matrix products whose rows do not depend on each other, with SwiGLU or the argmax at
  their end; ``tiles.json`` says for which shapes they replace cuBLAS, and with which tiles.
- ``rope``: between the qkv product and attention: norm and rotary embedding of q and k, and the
  write of k and v to the cache.
- ``norm``: the residual stream's sum and its norm.
- ``sample``: the choice of a token by temperature, filters and noise.
- ``overlap``: how one kernel starts before the last has ended.

Names that end in ``_op`` are custom operators, which torch.compile calls without looking inside.
Kernels start on the current CUDA device, which must be the tensors'.
"""
