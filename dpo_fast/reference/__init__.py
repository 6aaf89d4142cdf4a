"""Reference log-probs that are computed once: the store, the pass that fills it, and the model that it asks.

store/                        log-probs on disk
fingerprint, fingerprint_memo what the numbers depend on
compute, readback, audit      running the reference on what is missing, checking what is there
reference                     all of it for one model
"""
