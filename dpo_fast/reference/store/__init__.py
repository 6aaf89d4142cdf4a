"""A directory of reference log-probs on disk: immutable Parquet parts, and an index over them.

files, parts, index      what lies in the directory
keys                     what tells completions apart
lease                    who uses it
store, maintenance       using it, looking after it

Nothing here imports PyTorch or datasets.
"""
