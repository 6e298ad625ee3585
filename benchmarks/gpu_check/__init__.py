"""``make gpu-check``: whether the GPU path is right, and how fast, in one command under 10 minutes.

Sections run one after the other, each in a process of its own (``runner``): what one finds is safe
when the next one hangs, or breaks the process's CUDA context. A section is a function of a place
and a report (``section``); a table names them all (``sections``). Needs torch, msgspec, numpy,
safetensors and llguidance, but neither Ray nor a network.
"""
