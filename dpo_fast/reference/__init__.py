"""Reference log-probs that are computed once: the store, the pass that fills it, and the model that it asks.

files, parts, index      what lies in a store's folder
store, maintenance       using it, looking after it
fingerprint              what the numbers depend on
compute, audit, model    running the reference on what is missing, and checking what is there
"""
