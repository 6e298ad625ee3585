"""The options of ``serve`` about who may come in, and with how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.api_keys import hash_key
from cluster.cli.option import option, parse_bytes, parse_switch, parse_words

_LIMITS = (
    option(
        "--max-body-bytes", "gateway.max_body_bytes", "largest HTTP body (8M)", kind=parse_bytes
    ),
    option("--max-json-depth", "gateway.max_json_depth", "its deepest nesting (64)", kind=int),
    option(
        "--max-batch-prompts", "gateway.max_batch_prompts", "prompts in one request (256)", kind=int
    ),
    option("--max-n", "gateway.max_n", "choices of a prompt, up to 128 (16)", kind=int),
    option("--max-choices", "gateway.max_choices", "prompts times choices (512)", kind=int),
    option("--max-stop-strings", "gateway.max_stop_strings", "stop strings (16)", kind=int),
    option("--max-stop-chars", "gateway.max_stop_chars", "characters of one (256)", kind=int),
    option(
        "--max-logprobs", "gateway.max_logprobs", "alternatives told for a token (20)", kind=int
    ),
    option(
        "--request-timeout-s",
        "gateway.request_timeout_s",
        "longest life of a request, seconds (600)",
        kind=float,
    ),
)
SECURITY_OPTIONS = (
    *_LIMITS,
    option("--api-key", "gateway.api_keys", "key that clients must present"),
    option(
        "--api-key-file",
        "gateway.api_key_file",
        "keys that clients must present, one a line, or YAML with names and limits",
    ),
    option(
        "--key-max-concurrent",
        "gateway.key_max_concurrent",
        "requests of one key at once, in each gateway replica (256)",
        kind=int,
    ),
    option(
        "--key-requests-per-minute",
        "gateway.key_requests_per_minute",
        "requests of one key in a minute, in each gateway replica (no limit)",
        kind=float,
    ),
    option(
        "--key-tokens-per-minute",
        "gateway.key_tokens_per_minute",
        "prompt and output tokens of one key in a minute, in each gateway replica (no limit)",
        kind=float,
    ),
    option("--admin-host", "gateway.admin_host", "interface of the admin ports (127.0.0.1)"),
    option("--admin-key", "gateway.admin_keys", "key of the admin ports"),
    option("--admin-key-file", "gateway.admin_key_file", "keys of the admin ports"),
    option("--tls-cert", "gateway.tls_cert", "PEM certificate, with chain: TLS on every port"),
    option("--tls-key", "gateway.tls_key", "its key"),
    option(
        "--tls-client-ca",
        "gateway.tls_client_ca",
        "PEM authorities: clients must have a certificate of one of them (mutual TLS)",
    ),
    option(
        "--allow-unauthenticated",
        "gateway.allow_unauthenticated",
        "allow a public --host without keys",
        kind=parse_switch,
        is_switch=True,
    ),
    option(
        "--public-metrics",
        "gateway.public_metrics",
        "ask for no key at /metrics",
        kind=parse_switch,
        is_switch=True,
    ),
    option(
        "--cors-origins",
        "gateway.cors_origins",
        "web pages of these origins may call from a browser, commas between them (none)",
        kind=parse_words,
    ),
    option(
        "--debug-headers",
        "gateway.debug_headers",
        "answers name the gateway replica that gave them",
        kind=parse_switch,
        is_switch=True,
    ),
    option(
        "--trust-request-chat-template",
        "gateway.trust_request_chat_template",
        "render the chat templates that clients send, which can keep a core busy for ever",
        kind=parse_switch,
        is_switch=True,
    ),
)
"""Part of ``cluster.cli.serve_options.OPTIONS``."""
_KEYS = {
    "gateway.api_keys": "EXPERTMESH_API_KEYS",
    "gateway.admin_keys": "EXPERTMESH_ADMIN_KEYS",
}


def collect_keys(
    values: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """The keys of the options among ``values``, and more from the environment, hashed.

    ``EXPERTMESH_API_KEYS`` and ``EXPERTMESH_ADMIN_KEYS`` hold keys with commas between them.
    """
    found = {}
    for target, variable in _KEYS.items():
        more = (key.strip() for key in environment.get(variable, "").split(","))
        keys = [key for key in (values.get(target, ""), *more) if key]
        if keys:
            found[target] = tuple(map(hash_key, dict.fromkeys(keys)))
    return found


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that need no keys."""
    names = {f"EXPERTMESH_{kind}_KEY{s}" for kind in ("API", "ADMIN") for s in ("", "S")}
    return {name: value for name, value in environment.items() if name not in names}
