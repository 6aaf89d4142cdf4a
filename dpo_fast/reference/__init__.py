"""Reference log-probs that are computed once: the store, the pass that fills it, and the model that it asks.

store/                        log-probs on disk
fingerprint, lanes            what the numbers depend on: weights in memory, hashed, and settings
compute, readback             running the reference on what is missing
audit, audit_notes            checking what is there
reference                     all of it for one model
"""
