"""What `/metrics` tells, in Prometheus' text format."""

PREFIX = "surgery"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The counters of one front, in a registry of their own."""

    def __init__(self, max_batch):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        common = {"namespace": PREFIX, "registry": self._registry}
        self.requests = Counter(
            "requests", "Requests for images, and all that were refused, by HTTP status", ["status"], **common
        )
        self.images = Counter("images", "Images that were delivered", **common)
        self.latency = Histogram(
            "request_seconds",
            "From accepting a request to its images",
            buckets=_SECONDS,
            **common,
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

    def batch(self, size):
        """A batch was given to a replica."""
        self.batches.observe(size)

    def lost(self, size):
        """A batch's replica was lost."""
        self.deaths.inc()
        self.retried.inc(size)

    def text(self):
        """(the content of /metrics as bytes, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
