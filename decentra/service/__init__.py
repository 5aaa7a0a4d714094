"""The averaging service over ports: driver, mailbox, recovery. No grpc."""
