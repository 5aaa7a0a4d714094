"""WHO and WHEN: pure values and machines. No torch, asyncio, clock, randomness or network."""
