"""The hivemind adapter: p2p node, signed DHT records, blob store and blob streams. The only place that imports hivemind."""
