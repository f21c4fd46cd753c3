"""The record-level guarantee: sampling, clipping, noise, accounting, and the ledger that counts every step."""
