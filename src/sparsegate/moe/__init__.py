"""The sparsely-gated mixture of experts, on torch alone: gating decides, experts compute, losses balance."""
