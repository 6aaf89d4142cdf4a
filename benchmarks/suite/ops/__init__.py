"""The ops alone: head, rows, attention, Liger's loss."""
