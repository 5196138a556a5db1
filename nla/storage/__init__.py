"""The ground floor: files, hashes, tensors and the hub."""
