"""The sparsely-gated mixture-of-experts layer, on torch alone: decide (gating), compute (experts), balance (losses)."""
