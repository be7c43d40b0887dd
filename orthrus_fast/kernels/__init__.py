"""Triton kernels, one file each; imported lazily, only where a CUDA device is used.

- ``qk_norm_rope``: between the fused projection and attention: norm and rotary embedding of q and
  k, and the write of k and v to the cache.
- ``product``: matrix products whose rows do not depend on each other, for the shapes where a
  library's product fails ``rows_are_alike``.

Each file has a plain launcher, for eager code, and an opaque operator (``…_op``), for code under
torch.compile. Kernels start on the current CUDA device, which must be the tensors'.
"""
