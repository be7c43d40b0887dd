"""Triton kernels, one file each; imported lazily, only where a CUDA device is used.

- ``qk_norm_rope``: between the fused projection and attention: norm and rotary embedding of q and
  k, and the write of k and v to the cache.
- ``norm``: the residual stream's sum and its norm.
- ``product``: matrix products whose rows do not depend on each other, with SwiGLU or the search for
  the greatest logit at their end; ``tiles.json`` says for which shapes they take the library's
  place, and by which tiles.
- ``sample``: the choice of a token by temperature, filters and noise.
- ``overlap``: how one kernel starts before the last has ended.

Operators (``…_op``) are what torch.compile calls without looking inside. Kernels start on the
current CUDA device, which must be the tensors'.
"""
