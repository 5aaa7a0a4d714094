"""WHAT: pseudo-gradients, packets, aggregation and the account of a fragment. Torch, but no network and no clock."""
