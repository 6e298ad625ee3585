"""The routes of Responses in the OpenAPI document."""

from __future__ import annotations

from gateway.http.openapi import EndpointSpec
from gateway.responses import response_types
from gateway.responses.schema import ResponseBody

_LISTING = (
    (
        "limit",
        "Maximum number of items, 20 by default",
        (("type", "integer"), ("minimum", 1), ("maximum", 100)),
    ),
    ("order", "asc or desc (default)", (("type", "string"), ("pattern", "^(asc|desc)$"))),
    ("after", "Id of the item before the first one to list", (("type", "string"),)),
)
ENDPOINTS = (
    EndpointSpec(
        "/v1/responses",
        "Generate the next items of a conversation",
        response_types.ResponseObject,
        ResponseBody,
        response_types.EVENTS,
    ),
    EndpointSpec(
        "/v1/responses/{response_id}",
        "Return a stored response",
        response_types.ResponseObject,
        statuses=(400, 404),
    ),
    EndpointSpec(
        "/v1/responses/{response_id}",
        "Delete a stored response",
        response_types.DeletedResponse,
        statuses=(404,),
        method_override="delete",
    ),
    EndpointSpec(
        "/v1/responses/{response_id}/cancel",
        "Always rejected: a stored response is complete",
        response_types.ResponseObject,
        statuses=(400, 404),
        method_override="post",
    ),
    EndpointSpec(
        "/v1/responses/{response_id}/input_items",
        "List the input items of a stored response",
        response_types.ItemList,
        statuses=(400, 404),
        query=_LISTING,
    ),
)
"""The routes in the order of the OpenAPI document."""
