"""dpo_fast inside programs that have a trainer of their own: one file a host. Nothing in dpo_fast imports these."""
