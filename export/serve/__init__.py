"""A pipeline behind HTTP, on Ray Serve: one gateway that queues, batches and retries, replicas that draw.

The gateway (`gateway.py`, a Serve ingress with one replica) holds every accepted request, groups their images by equal
settings (`batching.py`) and gives each batch to a replica that is idle. So the queue has one length, a batch is as full
as all requests together allow, and what a dead replica was drawing is still there to be given to another. A replica
(`replica.py`) only draws. `serving.py` is the way from a model's name to a server that is ready, and back.

Ray, FastAPI and prometheus_client are the extra [ray]; nothing here imports them before a server is started.
"""
