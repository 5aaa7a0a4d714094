"""The reference mixture-of-experts decoder, bring-your-own models, generation and evaluation. No network and no optimizer."""
