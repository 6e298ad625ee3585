"""Inspections through real workers while steps fail: everything is found once, and is right."""

from __future__ import annotations

import numpy as np

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from tests.harness.failing_steps import FailingWorkerGroup, Faults, renew_on_fault
from tests.reference.goldens import load_golden
from tests.workers.inspection.test_inspection import everything
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import FinishReason, Request, SamplingParams


def test_steps_that_fail_add_nothing_twice() -> None:
    expected = load_golden("jetmoe-tied")
    prompts = [prompt for prompt in expected.prompts if len(prompt) > 4]
    engine = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    config = make_config(expected.path, 1, 2, dtype="float32", engine=engine)
    faults = Faults(Checkpoint(expected.path).family.banks, rate=0.5, seed=5)
    cluster = ThreadCluster(config, FailingWorkerGroup(faults))
    requests = [
        Request(
            request_id=f"r{i}",
            prompt=prompt,
            params=SamplingParams(max_tokens=0),
            inspection=everything(prompt, aux=True),
        )
        for i, prompt in enumerate(prompts)
    ]
    with serving(cluster):
        renew_on_fault(cluster, faults)
        stream = cluster.stream()
        faults.is_armed = True
        results = stream.finish(requests)
        stream.close()
    assert len(faults.seen) > 2
    local = LocalEngine(expected.path, dtype="float32")
    for request in requests:
        (output,) = results[request.request_id].outputs
        assert output.finish_reason is FinishReason.LENGTH
        assert request.inspection is not None
        want = local.inspect([request.prompt], request.inspection)[0]
        assert sorted(array.name for array in output.arrays) == sorted(want)
        for array in output.arrays:
            got = np.frombuffer(array.data, array.dtype).reshape(array.shape)
            assert np.allclose(got, want[array.name], atol=5e-4, equal_nan=True), array.name
