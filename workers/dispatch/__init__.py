"""Dispatch of rows to the experts, combine of their outputs, and the expert side of a step.

The path of a row, from a layer that yields ``Dispatch`` to the sum that the layer receives:

    dispatcher.py    ``TokenDispatcher``, which the model runner calls. ``LocalDispatcher``
                     (local.py) computes on this device and is the reference;
                     ``RemoteDispatcher`` (remote.py) selects the exchange of a step.
    expert_maps.py   The rank and slot of each expert of a row.
    row_exchange.py  Exchanges, attention side. ``RowExchange``: ``StaticExchange``,
                     ``ExactExchange``, ``CapturedExchange``; native_attention_side.py:
                     ``NativeExchange``, which also prepares the exchanges of native layers.
    row_serving.py   Exchanges, expert side; ``ExpertServer`` (expert_server.py) selects one.
                     ``RowServing``: ``StaticServing``, ``ExactServing``; native_expert_side.py:
                     ``NativeServing``; captured_serving.py: ``CapturedServing``.
    combine.py       Sum of the outputs of the expert ranks, in rank order.

``ColocatedDispatcher`` (colocated.py) has both sides on one worker. Imports ``workers.metrics``,
``workers.transport`` and the layers below them.
"""
