"""What /metrics says of a server."""

PREFIX = "surgery"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The counters of a server, all its models together, in a registry of their own."""

    def __init__(self, max_batch: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._registry = CollectorRegistry()
        ProcessCollector(namespace=PREFIX, registry=self._registry)
        common = {"namespace": PREFIX, "registry": self._registry}
        self.requests = Counter("requests", "Answers, by HTTP status; 499 is a client that left", ["status"], **common)
        self.images = Counter("images", "Images and videos that were delivered", **common)
        self.latency = Histogram(
            "request_seconds", "From accepting a request to its images", buckets=_SECONDS, **common
        )
        sizes = sorted({1, 2, 4, 8, 16, 32, max_batch})
        self.batches = Histogram(
            "batch_images", "Images in a batch", buckets=[size for size in sizes if size <= max_batch], **common
        )
        self.deaths = Counter("replica_deaths", "Batches whose replica died or could not be reached", **common)
        self.retried = Counter("retried_images", "Images that were queued again after that", **common)
        self.restarts = Counter("replica_restarts", "Replicas that came up again after all were up", **common)
        self.replicas = Gauge("replicas", "Replicas that are up", **common)
        self.in_flight = Gauge("requests_in_flight", "Requests that are accepted and not finished", **common)
        self.waiting = Gauge("queued_images", "Images that wait for a replica", **common)
        self.drawing = Gauge("batches_in_flight", "Batches that replicas are drawing", **common)
        self.kept = Gauge("kept_bytes", "Of images that were answered as a url", **common)

    def batch(self, size: int) -> None:
        """A batch was given to a replica."""
        self.batches.observe(size)

    def lost(self, size: int) -> None:
        """A batch's replica was lost."""
        self.deaths.inc()
        self.retried.inc(size)

    def text(self) -> tuple[bytes, str]:
        """(the content of /metrics as bytes, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
