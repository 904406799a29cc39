"""Store: records and artifacts under content keys, each written once, where all workers reach."""

from orchestrator.store.lease import Lease, LeaseLost
from orchestrator.store.opening import open_store
from orchestrator.store.store import Store

__all__ = ["Lease", "LeaseLost", "Store", "open_store"]
