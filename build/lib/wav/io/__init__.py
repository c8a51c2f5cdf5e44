"""Files on disk and objects in a store: atomic writes, digests, manifests."""
