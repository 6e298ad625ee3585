"""Dispatch and combine: rows to the experts, weighted sums back, and the expert side of a step.

The walk of a row, from a layer that yields ``Dispatch`` to the sum that it gets back:

    dispatcher.py    ``TokenDispatcher``, which the model runner calls. ``LocalDispatcher``
                     (local.py) computes at once and is the reference; ``RemoteDispatcher``
                     (remote.py) picks the exchange of a step.
    expert_maps.py   Which rows go where: the slot of each expert of the row, on which rank.
    row_exchange.py  How they are exchanged, attention side. ``RowExchange``: ``StaticExchange``,
                     ``ExactExchange``, ``CapturedExchange``; native_attention_side.py:
                     ``NativeExchange``, which also prepares the exchanges of native layers.
    row_serving.py   The same, expert side, as ``ExpertServer`` (expert_server.py) picks it.
                     ``RowServing``: ``StaticServing``, ``ExactServing``; native_expert_side.py:
                     ``NativeServing``; captured_serving.py: ``CapturedServing``.
    combine.py       How results combine: the outputs of the ranks, added up in their order.

``ColocatedDispatcher`` (colocated.py) is both sides on one worker. Imports ``workers.metrics``,
``workers.transport`` and the floors below.
"""
