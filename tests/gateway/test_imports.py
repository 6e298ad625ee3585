"""What the gateway may import."""

from __future__ import annotations

import subprocess
import sys

from tests.paths import ROOT

FREE_OF_RAY = (
    "gateway.http.api, gateway.grpc.server, gateway.engines.engine_pool, gateway.cluster.view"
)


def test_only_the_deployment_knows_ray_and_nothing_knows_torch() -> None:
    code = (
        f"import sys, {FREE_OF_RAY}\n"
        "print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_deployment_does_not_import_torch() -> None:
    code = (
        "import sys, gateway.app\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.strip() == "[]", done.stderr
