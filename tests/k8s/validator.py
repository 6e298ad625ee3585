"""Kubernetes objects against their schemas, without an API server.

Core kinds: the strict schemas of the package ``kubernetes-validate``. Custom kinds: the CRDs beside
this file. A field that no schema knows is an error, where a server would prune or refuse it. CEL
rules run by ``cel-python``; those about changes (``oldSelf``) do not. ``ray_rules`` are the KubeRay
operator's own (``validation.go`` of v1.7), which a live cluster tells only as an event. Not
checked: webhooks, immutability, quotas, and whether names refer to things that exist.

    kubectl kustomize k8s/overlays/cpu-kind | python -m tests.k8s.validator
"""

from __future__ import annotations

import lzma
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
import yaml
from celpy.adapter import json_to_cel
from celpy.celparser import CELParseError
from celpy.evaluation import CELEvalError

CRDS = Path(__file__).with_name("crds")
KUBERNETES = "1.34"
_QUANTITY = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?\d+)?")
_LABEL_VALUE = re.compile(r"(?!.{64})([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?")
_DNS_NAME = re.compile(r"[a-z0-9:]([-a-z0-9.:]{0,251}[a-z0-9])?")
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAME_LIMIT = 53
_REDIS_VARIABLES = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"}


class _Loader(yaml.CSafeLoader):
    """YAML as an API server reads it: no dates, and no key twice."""


_Loader.yaml_implicit_resolvers = {
    k: [i for i in v if not i[0].endswith("timestamp")]
    for k, v in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    keys = [loader.construct_object(k, deep=True) for k, _ in node.value]
    twice = [k for k in keys if keys.count(k) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"key {twice[0]!r} given twice", node.start_mark
        )
    return {
        k: loader.construct_object(v, deep=True) for k, (_, v) in zip(keys, node.value, strict=True)
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load(text: str) -> list[dict[str, Any]]:
    """The objects of a YAML stream. Raises ``yaml.YAMLError``."""
    return [d for d in yaml.load_all(text, _Loader) if d is not None]


def problems(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the objects, one line each; none if all are valid."""
    return [
        f"{d.get('kind')}/{(d.get('metadata') or {}).get('name')}: {problem}"
        for d in objects
        for problem in _problems(_without_nulls(d))
    ]


def _problems(d: Any) -> Iterator[str]:
    kind, meta = (str(d.get("apiVersion")), str(d.get("kind"))), d.get("metadata") or {}
    yield from _bad_strings(d, "$")
    schema = _schemas().get(kind)
    try:
        if schema is None:
            kubernetes_validate.validate(d, KUBERNETES, strict=True)
        else:
            yield from _custom_problems(d, kind, schema)
            plain = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}
            kubernetes_validate.validate(plain, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as err:
        yield f"{err.json_path}: {err.message[:200]}"
    except kubernetes_validate.SchemaNotFoundError:
        yield "no schema for this kind"
    if not _DNS_NAME.fullmatch(meta.get("name", "")):
        yield f"metadata.name {meta.get('name')!r} is no DNS name"


def _custom_problems(d: Any, kind: tuple[str, str], schema: Any) -> Iterator[str]:
    body = {k: v for k, v in d.items() if k not in ("metadata", "apiVersion", "kind")}
    errors = list(jsonschema.Draft202012Validator(_tightened(kind)).iter_errors(body))
    yield from sorted(f"{e.json_path}: {e.message[:200]}" for e in errors)
    yield from _walk(schema, body, "$")
    if kind == ("ray.io/v1", "RayCluster") and not errors:
        yield from ray_rules(d["spec"], d["metadata"].get("name", ""))


@cache
def _schemas() -> dict[tuple[str, str], Any]:
    """``(apiVersion, kind)`` -> schema."""
    found = {}
    for path in sorted(CRDS.glob("*.yaml.xz")):
        crd = yaml.load(lzma.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]
        for version in crd["versions"]:
            kind = (f"{crd['group']}/{version['name']}", crd["names"]["kind"])
            found[kind] = version["schema"]["openAPIV3Schema"]
    return found


@cache
def _tightened(kind: tuple[str, str]) -> Any:
    return _tighten(_schemas()[kind])


def _tighten(schema: Any) -> Any:
    """A JSON schema in which an unknown field is an error."""
    if not isinstance(schema, dict):
        return schema
    s = dict(schema)
    if s.pop("x-kubernetes-int-or-string", None):
        s.pop("anyOf", None)
        s["type"] = ["integer", "string"]
    fields = {name: _tighten(v) for name, v in s.get("properties", {}).items()}
    if "properties" in s:
        s["properties"] = fields
    s["required"] = [r for r in s.get("required", []) if "default" not in fields.get(r, {})]
    for key in ("items", "additionalProperties"):
        if isinstance(s.get(key), dict):
            s[key] = _tighten(s[key])
    loose = s.get("x-kubernetes-preserve-unknown-fields") or s.get("x-kubernetes-embedded-resource")
    if s.get("type") == "object" and "additionalProperties" not in s and not loose:
        s["additionalProperties"] = False
    if s.get("nullable") and isinstance(s.get("type"), str):
        s["type"] = [s["type"], "null"]
    return s


def _without_nulls(x: Any) -> Any:
    """A server takes a null for absent."""
    if isinstance(x, dict):
        return {k: _without_nulls(v) for k, v in x.items() if v is not None}
    return [_without_nulls(v) for v in x] if isinstance(x, list) else x


def _walk(schema: Any, x: Any, at: str) -> Iterator[str]:
    """What JSON schema cannot say: keys of list maps, and CEL."""
    if isinstance(x, dict):
        for key, value in x.items():
            below = (schema.get("properties") or {}).get(key) or schema.get("additionalProperties")
            if isinstance(below, dict):
                yield from _walk(below, value, f"{at}.{key}")
    if isinstance(x, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        got = [tuple(str(i.get(k)) for k in keys) for i in x] if keys else []
        if schema.get("x-kubernetes-list-type") == "set":
            got = [(str(i),) for i in x]
        yield from (f"{at}: {d} given twice" for d in sorted({g for g in got if got.count(g) > 1}))
        for i, value in enumerate(x):
            yield from _walk(schema.get("items") or {}, value, f"{at}[{i}]")
    for rule in schema.get("x-kubernetes-validations") or []:
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], x):
            yield f"{at}: {rule.get('message', rule['rule'])}"


def _holds(rule: str, x: Any) -> bool:
    """Whether a CEL rule holds; one that uses what only Kubernetes' own CEL has is let pass."""
    environment = celpy.Environment()
    try:
        program = environment.program(environment.compile(rule))
        return bool(program.evaluate({"self": json_to_cel(x)}))
    except (CELEvalError, CELParseError):
        return True


def _bad_strings(x: Any, at: str) -> Iterator[str]:
    """Formats that the published schemas leave open."""
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for k, v in items:
        if isinstance(v, dict) and k in ("requests", "limits"):
            for name, amount in v.items():
                if not _QUANTITY.fullmatch(str(amount)):
                    yield f"{at}.{k}.{name}: {amount!r} is no quantity"
        if isinstance(v, dict) and k in ("labels", "matchLabels", "selector", "nodeSelector"):
            for name, text in v.items():
                if isinstance(text, str) and not _LABEL_VALUE.fullmatch(text):
                    yield f"{at}.{k}.{name}: {text!r} is no label value"
        yield from _bad_strings(v, f"{at}.{k}")


def ray_rules(spec: Mapping[str, Any], name: str) -> Iterator[str]:
    """What the operator refuses in a RayCluster."""
    if len(name) > _NAME_LIMIT or not _DNS_LABEL.fullmatch(name):
        yield f"metadata.name: not a DNS-1035 label of at most {_NAME_LIMIT}"
    groups = [spec["headGroupSpec"], *(spec.get("workerGroupSpecs") or [])]
    for group in groups:
        yield from _group_rules(group, bool(spec.get("enableInTreeAutoscaling")))
    names = [g.get("groupName") for g in groups[1:]]
    if len(set(names)) < len(names):
        yield "workerGroupSpecs: groupName given twice"
    version = re.match(r"(\d+)\.(\d+)", spec.get("rayVersion", ""))
    has_tokens = version and (int(version[1]), int(version[2])) >= (2, 52)
    if (spec.get("authOptions") or {}).get("mode") == "token" and not has_tokens:
        yield "authOptions: token mode wants rayVersion >= 2.52"
    redis = spec.get("gcsFaultToleranceOptions")
    env = {e.get("name") for e in _pod(groups[0])["containers"][0].get("env") or []}
    if redis and env & _REDIS_VARIABLES:
        yield "head env sets redis beside gcsFaultToleranceOptions"
    if not redis and "RAY_REDIS_ADDRESS" in env:
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    if redis and redis.get("backend", "redis") == "redis" and redis.get("storage"):
        yield "gcsFaultToleranceOptions.storage is for rocksdb"


def _group_rules(group: Mapping[str, Any], autoscales: bool) -> Iterator[str]:
    name, params = group.get("groupName", "headGroup"), group.get("rayStartParams") or {}
    resources = {"num-cpus", "num-gpus", "memory", "resources"} & params.keys()
    if not _pod(group).get("containers"):
        yield f"{name}: no container"
    if "labels" in params:
        yield f"{name}: rayStartParams.labels is refused; use labels"
    if group.get("resources") and resources:
        yield f"{name}: resources in both rayStartParams and resources"
    if group.get("minReplicas", 0) > group.get("maxReplicas", 1 << 31):
        yield f"{name}: minReplicas > maxReplicas"
    if group.get("suspend") and autoscales:
        yield f"{name}: suspend and autoscaling"


def _pod(group: Mapping[str, Any]) -> Any:
    return group.get("template", {}).get("spec", {})


if __name__ == "__main__":
    found = load(sys.stdin.read())
    wrong = problems(found)
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.stderr.write(f"{len(found)} objects, {len(wrong)} problems\n")
    sys.exit(bool(wrong) or not found)
