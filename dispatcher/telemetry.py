"""Instruments. Each is an OpenTelemetry instrument, read by ``/metrics`` in Prometheus' format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Histogram, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, generate_latest

from dispatcher import __version__

#: W3C Trace Context, version 00: https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
#: Seconds: from a local launch to a task of a day.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200, 86400)
#: (labels, value) of a gauge at the moment it is read.
Reading = tuple[dict[str, str], float]


def valid_traceparent(text: str) -> str:
    """``text`` if it is a W3C traceparent, else ''."""
    return text if _TRACEPARENT.fullmatch(text) else ""


class Telemetry:
    """The instruments of one instance."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        # The scope would stand on every series as three labels that never differ.
        reader = PrometheusMetricReader(
            disable_target_info=True, scope_info_enabled=False, registry=self._registry
        )
        view = View(instrument_type=Histogram, aggregation=ExplicitBucketHistogramAggregation(_BUCKETS))
        # Given outright: left to itself the SDK looks for its resource in threads it waits for.
        resource = Resource({"service.name": "dispatcher", "service.version": __version__})
        self._provider = MeterProvider(
            metric_readers=[reader], views=[view], resource=resource, shutdown_on_exit=False
        )
        self._meter = self._provider.get_meter("dispatcher", __version__)
        self.finished = self._meter.create_counter(
            "dispatcher_tasks_finished_total", description="Tasks that ended, by queue, state and reason."
        )
        self.adoptions = self._meter.create_counter(
            "dispatcher_adoptions_total",
            description="Containers found running or ended instead of being made.",
        )
        self.queue_wait = self._meter.create_histogram(
            "dispatcher_queue_wait_seconds", description="From a task's acceptance to its being taken."
        )
        self.launch = self._meter.create_histogram(
            "dispatcher_launch_seconds", description="From the start gate to the container's start."
        )
        self.run = self._meter.create_histogram(
            "dispatcher_run_seconds", description="From a container's start to its end."
        )
        self.image_pull = self._meter.create_histogram(
            "dispatcher_image_pull_seconds", description="Duration of image pulls, by outcome."
        )
        self.image_bytes = self._meter.create_counter(
            "dispatcher_image_pull_bytes_total", description="Bytes downloaded by image pulls."
        )
        self.image_retries = self._meter.create_counter(
            "dispatcher_image_pull_retries_total",
            description="Pulls that were tried again by themselves, at no cost to a task.",
        )
        self.images_removed = self._meter.create_counter(
            "dispatcher_images_removed_total", description="Images removed to make room on the daemon."
        )

    def gauge(self, name: str, description: str, read: Callable[[], Iterable[Reading]]) -> None:
        """A gauge whose value ``read`` tells whenever somebody looks."""

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, labels) for labels, value in read()]

        self._meter.create_observable_gauge(name, callbacks=[observe], description=description)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def shutdown(self) -> None:
        """Let go of the instruments."""
        self._provider.shutdown()
