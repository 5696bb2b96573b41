"""A Hugging Face Hub on loopback for the tests, spoken to by the real huggingface_hub client."""

from .access import WRITE_TOKEN
from .entries import Entry, git_blob_oid
from .faults import KINDS, Fault
from .repository import COMMIT, Commit, PullRequest, Repository
from .server import HubServer, environment, hub_server
from .wire import LogEntry

__all__ = [
    "COMMIT",
    "KINDS",
    "WRITE_TOKEN",
    "Commit",
    "Entry",
    "Fault",
    "HubServer",
    "LogEntry",
    "PullRequest",
    "Repository",
    "environment",
    "git_blob_oid",
    "hub_server",
]
