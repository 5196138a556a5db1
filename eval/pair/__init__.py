"""A pair judged: fidelity, transfer, against graphs."""
