"""What Prometheus reads: counters and times by member, gauges of the engine as it stands, aliases of other names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from heliostat.serve.dispatch_asked import Open
from heliostat.serve.metrics_now import OURS, Snapshot, told
from heliostat.serve.protocol import Said, Spent

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
PHASES = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60)
THEIRS = "vllm:"
ALIASES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "num_preemptions",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
)
"""Also told under a second prefix and with the label that dashboards made for vLLM know."""


class Metrics:
    """A registry of its own, fed piece by piece."""

    def __init__(self, members: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.snapshot = Snapshot()
        self.members = set(members)
        self.first = self._histogram("time_to_first_token_seconds", "To the first token", SECONDS)
        self.gap = self._histogram("inter_token_latency_seconds", "Between tokens", GAPS)
        self.whole = self._histogram("e2e_request_latency_seconds", "To the last token", SECONDS)
        self.queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up")
        self.hits = self._counter("prefix_cache_hits", "Prompt tokens that did not have to run")
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self.spoken = self._counter("generation_tokens", "Tokens of answers")
        self.preemptions = self._counter("num_preemptions", "Requests that gave up their pages for a while")
        self.ended = self._counter("request_success", "Answers that ended", "finished_reason")
        self.phases = Histogram(
            f"{OURS}phase_seconds",
            "Waiting, running a prompt, moving its pages, decoding",
            ["phase", "member", "worker"],
            buckets=PHASES,
            registry=self.registry,
        )
        self.bytes = self._counter("transfer_bytes", "Bytes of pages that came from another worker", "worker")
        self.retries = self._counter("retries", "Attempts that a worker failed", "reason")
        self.speculated = {
            "drafted": self._counter("drafted_tokens", "Tokens that were drafted", "rule"),
            "accepted": self._counter(
                "accepted_tokens", "Drafted tokens that became part of an answer", "rule"
            ),
            "judged": self._counter(
                "judged_tokens", "Of these, tokens that the speaker had not chosen itself", "rule"
            ),
        }
        self.refused = Counter(
            f"{OURS}requests_refused", "Requests not taken in", ["status"], registry=self.registry
        )
        self.registry.register(_Now(self))
        self._aliases = CollectorRegistry()
        self._aliases.register(_Aliases(self.registry))

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(OURS + name, about, ["member", *labels], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(OURS + name, about, ["member"], buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry) + generate_latest(self._aliases)

    def begin(self, request: Open) -> None:
        """A request came in."""
        self.members.add(request.member)

    def prefilled(self, request: Open, spent: Spent, worker: str) -> None:
        """Its prompt was run."""
        self._phase("queue", request, worker, request.placing + spent.waited)
        self._phase("prefill", request, worker, spent.ran)

    def moved(self, request: Open, spent: Spent, worker: str) -> None:
        """Its pages came to another worker."""
        self._phase("queue", request, worker, spent.waited)
        self._phase("transfer", request, worker, spent.arriving)
        self.bytes.labels(request.member, worker).inc(spent.bytes)

    def decoded(self, request: Open, worker: str, now: float) -> None:
        """Somebody decodes it no more."""
        if request.decoding is not None:
            self._phase("decode", request, worker, now - request.decoding)

    def _phase(self, phase: str, request: Open, worker: str, seconds: float) -> None:
        self.phases.labels(phase, request.member, worker).observe(seconds)

    def retried(self, request: Open, why: str) -> None:
        """A worker failed it, and it goes on elsewhere or again."""
        self.retries.labels(request.member, why).inc()

    def said(self, request: Open, said: Said, now: float) -> None:
        """An answer got a token."""
        member = request.member
        self.spoken.labels(member).inc()
        if request.last is not None:
            self.gap.labels(member).observe(now - request.last)
        else:
            self.first.labels(member).observe(now - request.began)
            self._count_prompt(request)
        if said.speculated is not None:
            for counter, count in zip(self.speculated.values(), said.speculated, strict=True):
                counter.labels(member, request.order.speculation or "").inc(count)
        if said.preemptions > request.preemptions:
            self.preemptions.labels(member).inc(said.preemptions - request.preemptions)
        if said.finish is not None:
            self.whole.labels(member).observe(now - request.began)
            self.ended.labels(member, said.finish).inc()

    def _count_prompt(self, request: Open) -> None:
        for counter in (self.prompt, self.queries):
            counter.labels(request.member).inc(len(request.prompt))
        self.hits.labels(request.member).inc(request.cached_tokens)

    def average(self, histogram: Histogram) -> dict[str, float]:
        """Mean seconds by member, of those who have any."""
        sums: dict[str, dict[str, float]] = {}
        for metric in histogram.collect():
            for sample in metric.samples:
                sums.setdefault(sample.labels["member"], {})[sample.name.rpartition("_")[2]] = sample.value
        return {member: s["sum"] / s["count"] for member, s in sums.items() if s.get("count")}

    def speculation(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """(member, rule) -> tokens drafted, accepted, judged; of those for whom any were drafted."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for what, counter in self.speculated.items():
            for sample in (
                s for metric in counter.collect() for s in metric.samples if s.name.endswith("_total")
            ):
                pair = sample.labels["member"], sample.labels["rule"]
                found.setdefault(pair, {})[what] = int(sample.value)
        return {pair: (one["drafted"], one["accepted"], one["judged"]) for pair, one in sorted(found.items())}


class _Now(Collector):
    """Gauges and counters out of the latest snapshot."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Asked for at every scrape."""
        return told(self._metrics.snapshot, self._metrics.members)


class _Aliases(Collector):
    """The same numbers under the names that other dashboards ask for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Asked for at every scrape."""
        for metric in self._registry.collect():
            if metric.name.removeprefix(OURS) not in ALIASES:
                continue
            alias = Metric(
                metric.name.replace(OURS, THEIRS, 1), metric.documentation, metric.type, metric.unit
            )
            for sample in metric.samples:
                labels = {("model_name" if k == "member" else k): v for k, v in sample.labels.items()}
                alias.add_sample(sample.name.replace(OURS, THEIRS, 1), labels, sample.value)
            yield alias
