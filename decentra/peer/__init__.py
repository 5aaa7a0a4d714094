"""A member's runtime over ports: trainer, replica, fetch and the sync loop."""
