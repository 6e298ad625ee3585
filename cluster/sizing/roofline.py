"""Roofline formulas for the time of a decode step, by model, devices and layout. Pure.

    experts activated by B rows   u(B) = sum over experts of 1 - (1 - p)^B
    expert step     max(u(B) x bytes / bandwidth, 2 x B x k x params / flops) / devices / balance
    attention step  (weights + B x context x KV bytes) / bandwidth
    kernels         layers x kernels of a layer x time to start one, on GPUs, in both of these steps
    exchange        rows x distinct devices per row x bytes / link, there and back, and latencies

With two pools and m micro-batches of B / m rows, experts compute one micro-batch while attention
computes another: the time of the step is the largest of m x attention, m x experts, and the time of
one micro-batch from start to end. Full overlap needs m >= 2 (1 + Tcomm / Texpert), and each micro-
batch reads its weights again. Colocated workers run attention, then experts, and overlap only the
exchange.

The host's time is added once to each step: the host of an attention worker waits for its device at
the end of a step, then samples, commits the tokens and plans the next step while the device is
idle. The host of an expert worker works meanwhile, in less time. Not included are the messages by
which several attention workers agree on the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

MAX_MICRO_BATCHES = 2
"""Maximum number of micro-batches that the engine has in flight."""
SUM_BYTES = 4
"""Bytes of an element of a partial sum (float32). NCCL sends the model's dtype; this is ignored."""
ATTENTION_KERNELS = 12
"""Kernels of a layer on a GPU without its experts. A step of the 16 layers of OLMoE-1B-7B has 251
(docs/results/gpu.md). Models with torch's attention have more of them.
"""
EXPERT_KERNELS = 4
"""Kernels of a layer's experts on a GPU (docs/explanation/gpu.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """Time of the host in each step, while the device waits, for any number of layers."""

    step_s: float = 0.0
    """Seconds of a step of an attention worker, or of one worker with all experts."""
    row_s: float = 0.0
    """Further seconds for each row of such a worker."""
    expert_s: float = 0.0
    """Seconds of a step of an expert worker, for any number of rows."""

    def attention_s(self, rows: float) -> float:
        """Return the seconds of a step with ``rows`` rows on one attention worker."""
        return self.step_s + rows * self.row_s


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """Characteristics of one worker. ``cluster.sizing.devices`` has values with their sources."""

    name: str
    bandwidth_bytes_s: float
    """Rate of the memory, in bytes per second; kernels read at ``read_share`` of it."""
    flops_s: float
    """Rate of dense products in the model's dtype, in operations per second."""
    link_bytes_s: float
    """Transfer rate between two workers in one direction, in bytes per second."""
    latency_s: float
    """Seconds from the send of a message on one worker to the wake-up of the receiving worker."""
    message_s: float
    """Seconds of work that one message costs the sender, and also the receiver."""
    host: HostTime = field(default_factory=HostTime)
    """Time of the worker's host in each step; by default none."""
    read_share: float = 1.0
    """Fraction of ``bandwidth_bytes_s`` at which kernels read weights and KV."""
    kernel_s: float = 0.0
    """Seconds to start a kernel of a CUDA graph."""
    launch_s: float = 0.0
    """Seconds to start a kernel, or an NCCL message, that the host launches without a graph."""
    compute_share: float = 1.0
    """Fraction of ``flops_s`` that the products of a step with many rows reach."""

    def read_s(self, num_bytes: float) -> float:
        """Return the seconds in which kernels read ``num_bytes`` from memory."""
        return num_bytes / (self.bandwidth_bytes_s * self.read_share)

    def compute_s(self, operations: float) -> float:
        """Return the seconds in which products take ``operations``."""
        return operations / (self.flops_s * self.compute_share)

    def share(self, part: float) -> DeviceSpec:
        """Return a worker that owns ``part`` of the device.

        The host's time, the link and the latency do not change.
        """
        return replace(
            self,
            bandwidth_bytes_s=self.bandwidth_bytes_s * part,
            flops_s=self.flops_s * part,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BankSize:
    """Sizes of one expert bank."""

    num_experts: int
    top_k: int
    expert_values: int
    num_exchanges: int = 1
    in_values: int
    """Number of elements that a row sends to the experts, over all exchanges of the bank."""
    out_values: int
    """Number of elements that the experts return for a row, over all exchanges of the bank."""
    expert_bytes: int = 0
    """Bytes of one quantized expert; 0 if the expert's values have the model's dtype."""
    activation: tuple[float, ...] = ()
    """Share of rows that choose each expert, by expert; sums to ``top_k``. Empty if all equal."""

    def memory_bytes(self, itemsize: int) -> int:
        """Return the bytes of one expert in a worker's memory.

        ``itemsize``: bytes of a value of the model's dtype.
        """
        return self.expert_bytes or self.expert_values * itemsize

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Share of rows that choose each expert; equal shares if ``activation`` is empty."""
        return self.activation or (self.top_k / self.num_experts,) * self.num_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Sizes of a model that the roofline formulas use."""

    banks: tuple[BankSize, ...]
    attention_values: int
    """Weights that an attention rank reads in each step: all except experts and embedding."""
    kv_bytes_per_token: int
    """Bytes of the keys and values of one token, over all layers."""
    state_bytes: int = 0
    """Bytes of a sequence's recurrent state, which each step reads and writes."""
    itemsize: int
    """Bytes of a weight and of an element of a dispatched row."""
    is_captured: bool = True
    """Whether decode steps on GPUs are CUDA graphs; otherwise the host launches each kernel."""

    @property
    def num_exchanges(self) -> int:
        """Number of exchanges of a row with the experts, over all banks."""
        return sum(bank.num_exchanges for bank in self.banks)

    def start_s(self, device: DeviceSpec) -> float:
        """Return the seconds to start a kernel of a decode step on ``device``."""
        return device.kernel_s if self.is_captured else device.launch_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """A predicted decode step. The times of its parts, in seconds, are for one micro-batch."""

    layout: str
    """Text such as ``1 attention + 2 expert workers``."""
    num_micro_batches: int
    """Number of micro-batches (1 or 2) with which the step is faster."""
    attention_s: float
    """Seconds of attention and all other work except experts, for one micro-batch."""
    experts_s: float
    """Seconds of the experts on the most loaded worker, for one micro-batch."""
    exchange_s: float
    """Seconds to transport rows and expert outputs, for one micro-batch."""
    host_s: float
    """Seconds of the host for the whole step, while the devices wait."""
    step_s: float
    """Seconds of the whole step with all its micro-batches and the host's time."""

    @classmethod
    def of(
        cls,
        layout: str,
        m: int,
        *,
        attention_s: float,
        experts_s: float,
        exchange_s: float,
        host_s: float,
        is_colocated: bool = False,
    ) -> StepTime:
        """Compute the time of ``m`` micro-batches from the times of one and the host's time.

        On colocated workers, attention and experts take turns.
        """
        work_s = attention_s + experts_s
        busy_s = work_s if is_colocated else max(attention_s, experts_s)
        device_s = max(m * busy_s, work_s + exchange_s)
        return cls(
            layout=layout,
            num_micro_batches=m,
            attention_s=attention_s,
            experts_s=experts_s,
            exchange_s=exchange_s,
            host_s=host_s,
            step_s=device_s + host_s,
        )


def activated_experts(probabilities: Iterable[float], batch: float) -> float:
    """Return the expected number of experts that at least one of ``batch`` rows chooses.

    4 experts of 0.5 each, 2 rows: 4 x (1 - 0.25) = 3
    """
    return sum(1.0 - math.pow(1.0 - p, batch) for p in probabilities)


def distinct_devices(num_experts: int, top_k: int, num_devices: int) -> float:
    """Return the expected number of devices that hold any of a row's ``top_k`` experts.

    All experts are chosen equally often. 64 experts, top-8, 8 devices:
    8 x (1 - C(56, 8) / C(64, 8)) = 5.43
    """
    each = num_experts / num_devices
    missed = 1.0
    for i in range(top_k):
        missed *= max(num_experts - each - i, 0.0) / (num_experts - i)
    return num_devices * (1.0 - missed)


def expert_step(
    bank: BankSize,
    batch: float,
    *,
    num_devices: int,
    itemsize: int,
    device: DeviceSpec,
    balancedness: float = 1.0,
) -> float:
    """Return the seconds of one bank on the most loaded device, for ``batch`` rows of all ranks."""
    activated = activated_experts(bank.probabilities, batch)
    read_s = device.read_s(activated * bank.memory_bytes(itemsize))
    compute_s = device.compute_s(2.0 * batch * bank.top_k * bank.expert_values)
    return max(read_s, compute_s) / num_devices / balancedness


def attention_step(
    model: ModelSize, batch: float, context_tokens: float, device: DeviceSpec
) -> float:
    """Return the seconds of everything except experts, over all layers.

    ``batch``: number of rows of one attention rank.
    """
    kv_bytes = batch * context_tokens * model.kv_bytes_per_token
    read_bytes = model.attention_values * model.itemsize + kv_bytes + 2 * batch * model.state_bytes
    start_s = model.num_exchanges * ATTENTION_KERNELS * model.start_s(device)
    return device.read_s(read_bytes) + start_s


def disaggregated_step(
    model: ModelSize,
    batch: float,
    context_tokens: float,
    *,
    num_attention: int,
    num_experts: int,
    device: DeviceSpec,
    balancedness: float = 1.0,
) -> StepTime:
    """Return a predicted decode step of ``batch`` rows on separate attention and expert pools.

    The step has the number of micro-batches with which it is faster.
    """
    host_s = max(device.host.attention_s(batch / num_attention), device.host.expert_s)

    def micro_batches(m: int) -> StepTime:
        rows = batch / m
        attention_s = attention_step(model, rows / num_attention, context_tokens, device)
        attention_s += message_s(model, num_experts, device)
        experts_s = _experts(model, rows, num_experts, device, balancedness)
        experts_s += message_s(model, num_attention, device)
        # the smaller pool has the busiest link: all rows pass through each pool
        narrow = min(num_attention, num_experts)
        return StepTime.of(
            f"{num_attention} attention + {num_experts} expert workers",
            m,
            attention_s=attention_s,
            experts_s=experts_s,
            exchange_s=exchange_s(model, rows / narrow, num_experts, 1.0, device),
            host_s=host_s,
        )

    return _fastest(micro_batches)


def colocated_step(
    model: ModelSize,
    batch: float,
    context_tokens: float,
    *,
    num_workers: int,
    device: DeviceSpec,
    balancedness: float = 1.0,
) -> StepTime:
    """Return a predicted decode step of ``batch`` rows on colocated workers.

    A worker's own rows need no link. The step has the number of micro-batches with which it is
    faster. A single worker is one with all experts, as with ``--mode local``.
    """
    others = num_workers - 1
    host_s = device.host.attention_s(batch / num_workers) + bool(others) * device.host.expert_s

    def micro_batches(m: int) -> StepTime:
        rows = batch / m
        attention_s = attention_step(model, rows / num_workers, context_tokens, device)
        attention_s += message_s(model, others, device)
        experts_s = _experts(model, rows, num_workers, device, balancedness)
        experts_s += message_s(model, others, device)
        away = others / num_workers
        return StepTime.of(
            f"{num_workers} colocated workers",
            m,
            attention_s=attention_s,
            experts_s=experts_s,
            exchange_s=exchange_s(model, rows / num_workers, num_workers, away, device),
            host_s=host_s,
            is_colocated=True,
        )

    return _fastest(micro_batches)


def _fastest(micro_batches: Callable[[int], StepTime]) -> StepTime:
    """Return the step with the faster number of micro-batches; the smaller number if equal."""
    steps = map(micro_batches, range(1, MAX_MICRO_BATCHES + 1))
    return min(steps, key=lambda step: step.step_s)


def message_s(model: ModelSize, num_peers: int, device: DeviceSpec) -> float:
    """Return the seconds of work for a micro-batch's messages to and from all peers."""
    launch_s = 0.0 if model.is_captured else device.launch_s
    return 2 * num_peers * model.num_exchanges * (device.message_s + launch_s)


def _experts(
    model: ModelSize, batch: float, num_devices: int, device: DeviceSpec, balancedness: float
) -> float:
    """Return the seconds of all banks in sequence."""
    start_s = model.num_exchanges * EXPERT_KERNELS * model.start_s(device)
    return start_s + sum(
        expert_step(
            bank,
            batch,
            num_devices=num_devices,
            itemsize=model.itemsize,
            device=device,
            balancedness=balancedness,
        )
        for bank in model.banks
    )


def exchange_s(
    model: ModelSize, rows: float, num_devices: int, away: float, device: DeviceSpec
) -> float:
    """Return the seconds of dispatch and combine over one worker's link.

    ``away``: share of the rows that use the link.
    """
    seconds = 0.0
    for bank in model.banks:
        copies = rows * distinct_devices(bank.num_experts, bank.top_k, num_devices) * away
        row_bytes = bank.in_values * model.itemsize + bank.out_values * SUM_BYTES
        seconds += copies * row_bytes / device.link_bytes_s
        if away:
            seconds += 2 * bank.num_exchanges * device.latency_s
    return seconds


def activation_shares(counts: Sequence[float], top_k: int) -> tuple[float, ...]:
    """Return ``BankSize.activation`` for token counts of experts; empty if the counts are zero.

    A row chooses an expert at most once, so that no share exceeds 1.
    """
    total = sum(counts)
    return tuple(min(1.0, top_k * c / total) for c in counts) if total > 0 else ()
