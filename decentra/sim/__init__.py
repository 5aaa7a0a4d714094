"""peer/ and service/ on virtual time: memory adapters of every port, faults from a seed, and the checker over what happened."""
