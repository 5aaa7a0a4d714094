"""Generated protobuf code (package decentra.v1) from proto/; `make proto` writes it, nobody edits it."""
