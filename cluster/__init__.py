"""Control plane: configuration, placement, membership, the controller and the command line.

Leaf modules (``errors config config_checks gateway_config api_keys topology placement load_profile
load_report control_frames``) import the standard library and numpy only. ``planner``, the policies
and ``controller`` add only those; the edges (``worker_group controller_actor controller_handle
control_server``) add Ray and sockets. ``launch`` and ``cli`` wire everything together and may
import all packages.
"""
