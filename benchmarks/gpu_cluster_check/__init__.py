"""``make gpu-cluster-check``: a whole cluster on the GPUs of one host, in one command.

For each division of the GPUs (``layouts``) the command starts ``expertmesh serve`` and checks that
greedy tokens do not depend on the division, measures decode steps and compares them with the
roofline's predictions, and kills workers under load (``checks``). Needs the whole environment of a
server, with a torch for CUDA, but no network.
"""
