"""The averaging service's gRPC adapter: server, client, TLS; and the ledger's journal in SQLite. No decisions about rounds."""
