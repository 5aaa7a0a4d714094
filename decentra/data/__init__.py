"""Text to token windows: embedded domains, the user's files, and a resumable order. Tokens are bytes; no model and no network."""
