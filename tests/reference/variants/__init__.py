"""Configs of the tiny checkpoints that goldens are made of, a module for each family or kind.

``config`` holds exactly what is written to config.json besides the boilerplate. ``legacy_config``
variants keep the spelling of transformers 4 (rope_theta, rope_scaling, torch_dtype, keys that are
ignored), the others are rewritten by save_pretrained of the installed version.

- ``fused``: experts on disk as one tensor of three dimensions a layer, the names of version 5.
- ``store``: type of the tensors on disk (float32).
- ``bf16``: a run in bfloat16 is recorded, too.
- ``alone``: outputs depend on what else is in the batch (dynamic rope): no batched checks.
"""
