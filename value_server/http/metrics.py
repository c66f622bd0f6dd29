"""What the server counts, in Prometheus registries of its own: one a model.

    lenvm_step_seconds
    ├ lenvm_encode_seconds    bytes to rows, and logits to bytes
    ├ lenvm_queue_seconds     wait for the first pass
    ├ lenvm_prefill_seconds   passes up to the last one: the step brought a long text
    ├ lenvm_compute_seconds   its last pass, which gives the values
    └ the rest                from thread to thread and back

Each counts once for every answered step, so their averages add up.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from value_server.engine.engine import Engine
from value_server.engine.job import Job, JobResult

SECONDS = tuple(digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5))
COUNTS = tuple(float(2**n) for n in range(13))


class Metrics(Collector):
    """Figures of one model: those that it is told, and those that the engine keeps itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.registry = CollectorRegistry()
        self._step = self._seconds("step", "Time of a step request in the server.")
        self._encode = self._seconds("encode", "Decoding and encoding of a step.")
        self._queue = self._seconds("queue", "Wait of a step for its first forward pass.")
        self._prefill = self._seconds("prefill", "Forward passes of a step before its last one.")
        self._compute = self._seconds("compute", "Last forward pass of a step.")
        self._pass = self._seconds("pass", "Time of a forward pass.")
        self._pass_queries = self._counts("tokens", "Tokens and candidates in a forward pass.")
        self._pass_jobs = self._counts("requests", "Requests in a forward pass.")
        self._lookahead = self._counter("rows_lookahead", "Rows of steps that ask for lookahead.")
        self._pending = self._counter("rows_pending", "Rows of steps answered without values.")
        self._refused = self._counter("rows_refused", "Rows of steps refused.", "type")
        self.registry.register(self)

    def on_pass(self, queries: int, jobs: int, seconds: float) -> None:
        """See Batcher."""
        self._pass.observe(seconds)
        self._pass_queries.observe(queries)
        self._pass_jobs.observe(jobs)

    def on_step(self, job: Job, result: JobResult, encode_seconds: float, seconds: float) -> None:
        """A step was answered, `seconds` after its body was there."""
        for error in result.refused.values():
            self._refused.labels(error.type).inc()
        self._lookahead.inc(sum(row.lookahead_rank > 0 for row in job.rows))
        if not job.left or job.budget:
            self._pending.inc(result.pending)
        self._step.observe(seconds)
        self._encode.observe(encode_seconds)
        self._queue.observe(job.queue_seconds)
        self._prefill.observe(job.prefill_seconds)
        self._compute.observe(job.compute_seconds)

    def collect(self) -> Iterator[Metric]:
        """What the engine keeps: gauges, and counters, whose names get `_total`."""
        engine, cache, showing = self._engine, self._engine.cache, self._engine.showing
        for name, text, value in (
            ("sessions", "Sessions in use.", len(cache.sessions)),
            ("sessions_idle", "Sessions that may go when others want slots.", len(cache.idle)),
            ("sessions_waiting", "Sessions that wait for slots.", len(cache.line)),
            ("slots_used", "KV slots of sessions in use.", cache.used),
            (
                "slots_kept",
                "KV slots of idle and closed texts alone, which go when others want them.",
                cache.kept,
            ),
            ("slots", "KV slots in all.", cache.size),
            ("pictures", "Pictures held.", len(showing.store) if showing else 0),
            (
                "picture_bytes",
                "Bytes of their embeddings.",
                showing.store.bytes if showing else 0,
            ),
        ):
            yield GaugeMetricFamily(f"lenvm_{name}", text, value)
        for name, text, value in (
            ("evictions", "Idle sessions that lost their slots to others.", cache.evictions),
            (
                "preemptions",
                "Sessions in use that lost their slots to older ones.",
                cache.preemptions,
            ),
            ("pass_failures", "Forward passes that failed.", engine.pace.failed),
            ("expirations", "Sessions dropped because nobody used them.", cache.expirations),
            ("prefix_tokens", "Tokens of texts sent from their start.", cache.prefix_tokens),
            ("prefix_hits", "Of these, tokens that were held already.", cache.prefix_hits),
            ("tokens_forwarded", "Tokens and candidates through the model.", engine.forwarded),
            ("tokens_saved", "Tokens and candidates held already.", engine.saved),
            (
                "rows_without_picture",
                "Rows without values since a picture of theirs was not there.",
                showing.missing if showing else 0,
            ),
        ):
            yield CounterMetricFamily(f"lenvm_{name}", text, value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lenvm_{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"lenvm_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

    def _counts(self, name: str, text: str) -> Histogram:
        return Histogram(f"lenvm_pass_{name}", text, buckets=COUNTS, registry=self.registry)


class Figures(Collector):
    """All figures of a server; those of a model that has a name are labelled with it."""

    def __init__(self, models: Mapping[str, Metrics]) -> None:
        self._models = dict(models)
        self._own, self._registry = CollectorRegistry(), CollectorRegistry()
        text = "Requests refused or failed."
        self._errors = Counter("lenvm_errors", text, ("type", "model"), registry=self._own)
        self._registry.register(self)

    def error(self, kind: str, model: str) -> None:
        """A request was refused, or failed. model: that it named, if it is one."""
        self._errors.labels(kind, model if model in self._models else "").inc()

    def listen(self, host: str, port: int, cert: Path | None, key: Path | None) -> int:
        """Show the figures, and nothing else, on a port of their own; the port (another for 0).

        https where a certificate is given. Raises OSError where the port is not to be had.
        """
        cert_file, key_file = (str(path) if path else None for path in (cert, key))
        try:
            server, _thread = start_http_server(port, host, self._registry, cert_file, key_file)
        except OSError as error:
            raise OSError(f"metrics_port: {host}:{port}: {error.strerror}") from error
        return int(server.server_port)

    def collect(self) -> Iterator[Metric]:
        """One family a name, with the samples of all models."""
        families: dict[str, Metric] = {}
        registries = [(name, model.registry) for name, model in self._models.items()]
        for name, registry in [*registries, ("", self._own)]:
            for found in registry.collect():
                known = families.setdefault(found.name, found)
                samples = [_labelled(sample, name) for sample in found.samples]
                known.samples = samples if known is found else [*known.samples, *samples]
        yield from families.values()

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


def _labelled(sample: Sample, model: str) -> Sample:
    """With the label `model`; a model without a name has none, as where there is but one."""
    labels = {"model": model} | sample.labels
    return sample._replace(labels={key: value for key, value in labels.items() if value})
