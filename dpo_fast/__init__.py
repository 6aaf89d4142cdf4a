"""dpo_fast: train language models with Direct Preference Optimization, fast."""
