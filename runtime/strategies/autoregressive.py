"""Plain decoding: the target makes every token. The baseline of every comparison."""

from ssv.bundle.policy import Policy

AUTOREGRESSIVE = Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=0)
