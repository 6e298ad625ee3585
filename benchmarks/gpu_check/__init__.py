"""``make gpu-check``: correctness and speed of the GPU path, in one command under 10 minutes.

Each section runs in a separate process (``runner``), so that its results are kept if a later
section hangs or breaks the CUDA context. A section is a function of a ``Place`` and a ``Report``
(``section``); ``sections`` lists them all. Needs torch, msgspec, numpy, safetensors and llguidance,
but neither Ray nor a network.
"""
