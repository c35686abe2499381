"""Privacy: every (ε, δ) that is ever printed is composed from one append-only ledger."""
