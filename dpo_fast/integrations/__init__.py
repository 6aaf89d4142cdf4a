"""dpo_fast inside programs that have a trainer of their own: one entry per host.

trl      TRL's DPOTrainer, accelerated; patch_trl() does it to TRL's own class
liger    Liger's LigerFusedLinearDPOLoss, computed by our ops
"""
