"""What travels: protobuf <-> domain values, signed statements, and the papers of trust. No network, no clock."""
